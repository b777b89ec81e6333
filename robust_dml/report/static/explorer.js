'use strict'
const D = JSON.parse(document.getElementById('found').textContent)
const $ = id => document.getElementById(id)
const [H, W] = D.side, attacks = D.grid.attacks, where = new Map(D.images.map((image, k) => [image, k]))
const options = {model: D.models.map(m => m.label), query: D.queries, attack: attacks, eps: D.grid.eps, steps: D.grid.steps}
const state = {model: 0, query: 0, attack: Math.max(0, attacks.indexOf('ES')), eps: Math.min(1, D.grid.eps.length - 1), steps: D.grid.steps.length - 1}
const tables = D.models.map(m => ({
  before: new Map(m.searches.map(s => [[s.query, s.attack].join(), s])),
  after: new Map(m.records.map((r, k) => [[r.query, r.attack, r.eps, r.steps].join(), {...r, k}]))}))
let sheets = []

function element(name, text, kind) {
  const made = document.createElement(name)
  if (text !== undefined) made.textContent = text
  if (kind) made.className = kind
  return made
}
function picture(sheet, k, says) {
  const canvas = Object.assign(element('canvas'), {width: W, height: H})
  canvas.getContext('2d', {willReadFrequently: true}).drawImage(sheets[sheet], k % 32 * W, Math.floor(k/32)*H, W, H, 0, 0, W, H)
  if (says) { canvas.setAttribute('role', 'img'); canvas.setAttribute('aria-label', says) }
  else canvas.setAttribute('aria-hidden', 'true')
  return canvas
}
function difference(clean, attacked, eps) {
  const pixels = c => c.getContext('2d').getImageData(0, 0, W, H)
  const from = pixels(clean), to = pixels(attacked)
  to.data.forEach((v, i) => { if (i % 4 < 3) to.data[i] = 127.5 + 127.5*(v - from.data[i])/Math.max(1, eps) })
  const canvas = Object.assign(element('canvas'), {width: W, height: H})
  canvas.getContext('2d').putImageData(to, 0, 0)
  canvas.setAttribute('role', 'img')
  canvas.setAttribute('aria-label', 'difference of the two')
  return canvas
}

const at = (model, change = {}) => {
  const s = {...state, ...change}, key = [s.query, attacks[s.attack]]
  return {before: tables[model].before.get(key.join()), after: tables[model].after.get([...key, D.grid.eps[s.eps], D.grid.steps[s.steps]].join())}
}
const label = image => D.labels[where.get(image)]
const place = n => (n + 1).toLocaleString('en')
const asker = before => before.asks ?? D.queries[state.query]
const hits = (before, top) => top.filter(image => label(image) === label(asker(before))).length

function results(list, before, top, other, words, swapped) {
  list.replaceChildren(...top.map((image, k) => {
    const hit = label(image) === label(asker(before)), own = swapped !== undefined && image === before.watched
    const item = element('li', undefined, hit ? 'hit' : 'miss'), frame = element('div', undefined, 'frame')
    frame.append(own ? picture(1 + state.model, swapped, 'the changed image') : picture(0, where.get(image), hit ? 'same class' : 'other class'))
    item.append(frame, element('span', hit ? '✓ ' : '✗ ', 'mark'))
    if (image === before.watched) item.append(element('span', '★ ', 'star'))
    item.append(words + ' ' + place(other[k]))
    return item
  }))
}
function pictures(before, after) {
  const eps = D.grid.eps[state.eps], clean = picture(0, where.get(D.queries[state.query]), 'the clean image'), attacked = picture(1 + state.model, after.k, 'the attacked image')
  const shown = [[clean, 'clean'], [attacked, 'attacked'], [difference(clean, attacked, eps), `difference: black −${eps}/255, grey 0, white +${eps}/255`]]
  if (before.asks !== null) shown.push([picture(0, where.get(before.asks), 'the image that asks'), 'who asks: the results are theirs'])
  $('pictures').replaceChildren(...shown.map(([canvas, text]) => { const f = element('figure'); f.append(canvas, element('figcaption', text)); return f }))
}
function sentence(before, after) {
  const goal = D.goals[attacks[state.attack]], n = before.top.length, moves = before.place === after.place ? `stays at place ${place(before.place)}` : `goes from place ${place(before.place)} to place ${place(after.place)}`
  return `${options.model[state.model]} under ${attacks[state.attack]}, ε = ${D.grid.eps[state.eps]}/255, ${D.grid.steps[state.steps]} step${D.grid.steps[state.steps] > 1 ? 's' : ''}: ${goal.deed}. ` +
    `${goal.watched[0].toUpperCase()}${goal.watched.slice(1)} ${moves} of ${D.others.toLocaleString('en')}. Of the first ${n} results, ${hits(before, before.top)} are of the class looked for before the attack and ${hits(before, after.top)} after it.`
}

function row(cells, now) {
  const line = element('tr', undefined, now ? 'now' : '')
  cells.forEach((cell, k) => line.append(cell instanceof Node ? cell : element(k ? 'td' : 'th', cell)))
  line.firstChild.scope = 'row'
  return line
}
function overview() {
  $('budgets').replaceChildren(...D.grid.steps.map((steps, j) => row([`${steps} step${steps > 1 ? 's' : ''}`, ...D.grid.eps.map((eps, i) =>
    element('td', place(at(state.model, {eps: i, steps: j}).after.place), i === state.eps && j === state.steps ? 'now' : ''))])))
  $('models').replaceChildren(...D.models.map((m, k) => {
    const {before, after} = at(k)
    return row([m.label, m.r_at_1.toFixed(1), place(before.place), place(after.place), `${hits(before, before.top)} → ${hits(before, after.top)}`, after.moved.toFixed(3)], k === state.model)
  }))
}
function render() {
  const {before, after} = at(state.model)
  pictures(before, after)
  $('said').textContent = sentence(before, after)
  results($('before'), before, before.top, after.went, 'now at')
  results($('after'), before, after.top, after.came, 'was at', before.asks === null ? undefined : after.k)
  overview()
  for (const name in state) document.querySelectorAll(`input[name=${name}]`)[state[name]].checked = true
}
function choose(name, text, drawn) {
  const box = element('div')
  options[name].forEach((value, k) => {
    const label = element('label'), input = Object.assign(element('input'), {type: 'radio', name, value: k})
    input.setAttribute('aria-label', `${name} ${text(value, k)}`)
    input.addEventListener('change', () => { state[name] = k; location.replace('#' + new URLSearchParams(state)); render() })
    label.append(input, drawn ? drawn(value) : text(value, k))
    box.append(label)
  })
  $(name).append(box)
}
function recall() {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) if (name in state && options[name][value] !== undefined) state[name] = +value
}
function loaded(data) {
  return new Promise((done, failed) => { const image = new Image(); image.onload = () => done(image); image.onerror = failed; image.src = 'data:image/png;base64,' + data })
}
Promise.all(D.sheets.map(loaded)).then(found => {
  sheets = found
  choose('query', (_, k) => k + 1, image => picture(0, where.get(image)))
  for (const name of ['model', 'attack', 'steps']) choose(name, String)
  choose('eps', value => value + '/255')
  recall()
  render()
  addEventListener('hashchange', () => { recall(); render() })
  document.documentElement.dataset.ready = 'yes'
})
