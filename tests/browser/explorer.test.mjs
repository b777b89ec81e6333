// The explorer opens from the file system, answers every choice with the numbers of its results.json, and needs no mouse.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { address, browser, overflow, root, shots, watched } from './common.mjs'

const path = 'reports/explorer-glyphs-quick'
const found = JSON.parse(readFileSync(join(root, path, 'results.json'), 'utf8'))
const record = chosen => found.models[chosen.model].records.find(r => r.query === chosen.query && r.attack === chosen.attack && r.eps === chosen.eps && r.steps === chosen.steps)
const search = chosen => found.models[chosen.model].searches.find(r => r.query === chosen.query && r.attack === chosen.attack)

async function ready(page, hash = '') {
  await page.goto(address(`${path}/index.html`) + hash)
  await page.waitForSelector('html[data-ready=yes]')
}
const choice = async page => Object.fromEntries(await page.evaluate(() => ['model', 'query', 'attack', 'eps', 'steps'].map(name => [name, +document.querySelector(`input[name=${name}]:checked`).value])))
const named = c => ({ model: c.model, query: c.query, attack: found.grid.attacks[c.attack], eps: found.grid.eps[c.eps], steps: found.grid.steps[c.steps] })
const places = async page => (await page.locator('#after li').allInnerTexts()).map(text => +text.replace(/.*was at/s, '').replace(/,/g, '') - 1)

async function agrees(page) {
  const chosen = named(await choice(page)), after = record(chosen), before = search(chosen)
  assert.deepEqual(await places(page), after.came)
  assert.equal(await page.locator('#before li').count(), before.top.length)
  const words = before.place === after.place ? `stays at place ${(before.place + 1).toLocaleString('en')} ` : `from place ${(before.place + 1).toLocaleString('en')} to place ${(after.place + 1).toLocaleString('en')} `
  assert.ok((await page.locator('#said').innerText()).includes(words), words)
  const labels = new Map(found.images.map((image, k) => [image, found.labels[k]])), wanted = labels.get(before.asks ?? found.queries[chosen.query])
  assert.equal(await page.locator('#after li.hit').count(), after.top.filter(image => labels.get(image) === wanted).length)
  return chosen
}

test('explorer', async t => {
  const chromium = await browser(t)

  await t.test('opens without a server, an error or a request, and fits a telephone', async () => {
    const { page, errors, outside } = await watched(chromium)
    await ready(page)
    await agrees(page)
    await shots(page, 'explorer')
    assert.ok(await overflow(page) <= 0)
    assert.deepEqual([errors, outside], [[], []])
    await page.context().close()
  })

  await t.test('every choice changes the ranks', async () => {
    const { page } = await watched(chromium)
    const base = { model: 0, query: 0, attack: found.grid.attacks.indexOf('LTM'), eps: found.grid.eps.length - 1, steps: found.grid.steps.length - 1 }
    for (const name of Object.keys(base)) {
      await ready(page, '#' + new URLSearchParams(base))
      await page.reload()
      await page.waitForSelector('html[data-ready=yes]')
      const before = await places(page), count = await page.locator(`input[name=${name}]`).count()
      const other = [...Array(count).keys()].find(k => record(named({ ...base, [name]: k })).came.join() !== record(named(base)).came.join()) // one that results.json says is different
      await page.locator(`label:has(input[name=${name}][value="${other}"])`).click()
      await agrees(page)
      assert.notDeepEqual(await places(page), before, name)
    }
    await page.context().close()
  })

  await t.test('all attacks agree with results.json', async () => {
    const { page } = await watched(chromium)
    await ready(page)
    for (const k of found.grid.attacks.keys()) {
      await page.locator(`label:has(input[name=attack][value="${k}"])`).click()
      assert.equal((await agrees(page)).attack, found.grid.attacks[k])
    }
    await page.locator('label:has(input[name=attack][value="0"])').click() // CA+: the results are somebody else's
    assert.equal(await page.locator('#pictures figure').count(), 4)
    await shots(page, 'explorer-ca')
    await page.context().close()
  })

  await t.test('works with the keyboard, and a link keeps the choice', async () => {
    const { page } = await watched(chromium)
    await ready(page)
    await page.locator('input[name=eps]:checked').focus()
    const { eps } = await choice(page)
    await page.keyboard.press('ArrowRight')
    assert.equal((await choice(page)).eps, eps + 1)
    await agrees(page)
    await page.keyboard.press('Tab')
    assert.equal(await page.evaluate(() => document.activeElement.name), 'steps')
    const chosen = await choice(page), hash = new URL(page.url()).hash
    await page.goto('about:blank')
    await ready(page, hash)
    assert.deepEqual(await choice(page), chosen)
    await page.context().close()
  })

  await t.test('a damaged link is ignored; dark pages are dark', async () => {
    const { page, errors } = await watched(chromium, { colorScheme: 'dark' })
    await ready(page, '#model=99&query=x&nothing=1&eps=-1')
    await agrees(page)
    const [r, g, b] = await page.evaluate(() => getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number))
    assert.ok(r + g + b < 150, 'dark')
    await shots(page, 'explorer-dark')
    assert.deepEqual(errors, [])
    await page.context().close()
  })
})
