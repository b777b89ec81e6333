// The HTML pages of `make docs` in a real browser: search, formulas, copy buttons, links, width, and nothing from outside.
import assert from 'node:assert/strict'
import { existsSync } from 'node:fs'
import { mkdir, readFile } from 'node:fs/promises'
import { createServer } from 'node:http'
import { extname, join, normalize, resolve } from 'node:path'
import test, { after, before } from 'node:test'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { chromium } from 'playwright-core'

const root = resolve(fileURLToPath(import.meta.url), '../../..'), docs = join(root, 'build/docs/html')
const flags = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
const types = { '.html': 'text/html', '.css': 'text/css', '.js': 'text/javascript', '.svg': 'image/svg+xml', '.png': 'image/png', '.json': 'application/json' }
let server, base, browser

before(async () => {
  assert.ok(existsSync(join(docs, 'index.html')), 'expected build/docs/html/index.html, found none; run make docs first')
  server = createServer(async (request, response) => {
    const path = normalize(decodeURIComponent(new URL(request.url, 'http://x').pathname))
    const file = join(docs, path.endsWith('/') ? path + 'index.html' : path)
    try {
      const body = await readFile(file)
      response.writeHead(200, { 'content-type': types[extname(file)] ?? 'application/octet-stream' }).end(body)
    } catch { response.writeHead(path === '/favicon.ico' ? 204 : 404).end() }
  }).listen(0, '127.0.0.1')
  await new Promise(done => server.once('listening', done))
  base = `http://127.0.0.1:${server.address().port}`
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM || '/usr/bin/chromium', headless: true, args: flags })
})
after(async () => { await browser?.close(); server?.close() })

/** A page that notes errors, failed requests and requests to anywhere else. */
async function watched({ width = 1300, ...options } = {}) {
  const context = await browser.newContext({ viewport: { width, height: 900 }, ...options })
  const page = await context.newPage(), bad = []
  page.setDefaultTimeout(60_000)
  page.on('pageerror', error => bad.push(`error: ${error.message}`))
  page.on('console', message => { if (message.type() === 'error') bad.push(`console: ${message.text()}`) })
  page.on('response', response => { if (response.status() >= 400) bad.push(`${response.status()}: ${response.url()}`) })
  page.on('request', request => { if (!/^(file|data|blob|about):/.test(request.url()) && !request.url().startsWith(base)) bad.push(`outside: ${request.url()}`) })
  return { page, bad, context }
}

async function shot(page, name) {
  await mkdir(join(root, 'build/screenshots'), { recursive: true })
  await page.screenshot({ path: join(root, `build/screenshots/${name}.png`) })
}

test('two clicks lead from the start page to the equation of collapseness', async () => {
  const { page, bad } = await watched()
  await page.goto(`${base}/index.html`)
  await shot(page, 'docs-start-1300')
  await page.click('article a:has-text("Find an equation")')
  await page.waitForSelector('article mjx-container')
  await shot(page, 'docs-equations-1300')
  await page.click('tr:has-text("(5)"):has-text("collapseness of the batch") a:has-text("triplets/02_collapse")')
  await page.waitForURL(/nbs\/triplets\/02_collapse\.html#cell-/)
  await page.waitForSelector('mjx-container svg')
  assert.ok(await page.locator('div.math mjx-container').count() >= 2, 'expected the equations of the notebook typeset')
  assert.ok(!(await page.locator('article').innerText()).includes('\\frac'), 'expected no raw LaTeX')
  assert.deepEqual(bad, [])
})

test('the search finds collapseness, served and from the file system', async () => {
  for (const start of [base, pathToFileURL(docs).href]) {
    const { page, bad } = await watched()
    await page.goto(`${start}/search.html?q=collapseness`)
    await page.waitForSelector('#search-results li a')
    await page.waitForFunction(() => /found/i.test(document.querySelector('#search-results p.search-summary')?.textContent ?? ''))
    const found = await page.locator('#search-results li a').evaluateAll(links => links.map(a => a.getAttribute('href')))
    assert.ok(found.some(href => href.includes('robust_dml.triplets.collapse.collapseness')), `expected the function among ${found.slice(0, 5)}`)
    assert.ok(found.some(href => href.includes('triplets/02_collapse')), `expected the notebook among ${found.slice(0, 9)}`)
    assert.deepEqual(bad, [])
  }
})

test('code copies without its output', async () => {
  const { page, bad, context } = await watched()
  await context.grantPermissions(['clipboard-read', 'clipboard-write'])
  await page.goto(`${base}/nbs/triplets/02_collapse.html`)
  const cell = page.locator('div.tag_export div.highlight', { hasText: 'def collapseness' })
  await cell.hover()
  await cell.locator('button.copybtn').click()
  const copied = await page.evaluate(() => navigator.clipboard.readText())
  assert.match(copied, /^def [\s\S]*collapseness/)
  assert.equal(copied.trim(), (await cell.locator('pre').innerText()).trim())
  assert.deepEqual(bad, [])
})

test('no page is wider than a telephone, light and dark', async () => {
  for (const [scheme, path] of [['light', 'index.html'], ['dark', 'nbs/triplets/02_collapse.html'], ['light', 'equations.html'], ['light', 'attacks.html'], ['dark', 'defenses.html'], ['light', 'api/triplets.collapse.html'],
    ['light', 'paper_and_code.html'], ['light', 'claims.html'], ['light', 'errata.html'], ['light', 'reports.html'], ['dark', 'benchmarks.html'], ['light', 'nbs/defenses/01_colo_tride.html'], ['light', 'glossary.html']]) {
    const { page, bad, context } = await watched({ width: 400, colorScheme: scheme })
    await page.goto(`${base}/${path}`)
    await page.waitForLoadState('networkidle')
    await shot(page, `docs-${path.replace(/\W+/g, '-')}-400`)
    assert.ok(await page.evaluate(() => document.documentElement.scrollWidth - innerWidth) <= 0, `${path} is wider than 400 pixels`)
    const [r, g, b] = await page.evaluate(() => getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number))
    assert.equal((r + g + b)/3 < 128, scheme === 'dark', `${path} must follow the colour scheme ${scheme}`)
    assert.deepEqual(bad, [])
    await context.close()
  }
})

test('every link inside the pages leads to a place that exists', async () => {
  const pages = new Map(), todo = ['/index.html'], broken = []
  const ids = body => new Set([...body.matchAll(/\s(?:id|name)="([^"]+)"/g)].map(m => m[1]))
  async function read(path) {
    if (!pages.has(path)) {
      const response = await fetch(base + path)
      const body = response.ok && /html/.test(response.headers.get('content-type')) ? await response.text() : ''
      pages.set(path, { ok: response.ok, body, ids: ids(body) })
      if (body) todo.push(path)
    }
    return pages.get(path)
  }
  await read('/index.html')
  for (const path of todo) {
    for (const [, raw] of pages.get(path).body.replace(/<pre>[\s\S]*?<\/pre>/g, '').matchAll(/\s(?:href|src)="([^"]*)"/g)) {
      if (/^(data:|mailto:|javascript:|https?:)/.test(raw) || raw === '') continue
      const url = new URL(raw.replaceAll('&amp;', '&'), base + path), target = decodeURIComponent(url.pathname)
      const found = await read(target.endsWith('/') ? target + 'index.html' : target)
      const anchor = decodeURIComponent(url.hash.slice(1))
      if (!found.ok || anchor && found.body && !found.ids.has(anchor)) broken.push(`${path} -> ${raw}`)
    }
  }
  assert.deepEqual([...new Set(broken)], [])
  const notebooks = [...pages.keys()].filter(path => path.startsWith('/nbs/') && /\/(\d\d|run)_/.test(path))
  assert.ok(pages.size > 100 && notebooks.length > 60, `expected to reach every notebook, found ${notebooks.length} of them on ${pages.size} pages`)
})

test('pages and reports ask nobody outside for anything', async () => {
  const { page, bad } = await watched()
  for (const path of ['nbs/papers/colo_tride/02_guide.html', 'nbs/attacks/01_suite.html', 'api/defenses.colo_tride.html', 'nbs/run_table1.html', 'reports/table1-glyphs-quick/index.html', 'genindex.html']) {
    await page.goto(`${base}/${path}`)
    await page.waitForLoadState('networkidle')
    await shot(page, `docs-${path.replace(/\W+/g, '-')}-1300`)
  }
  await page.goto(`${base}/nbs/papers/colo_tride/02_guide.html`)
  await page.waitForSelector('.cell_output mjx-container')
  assert.deepEqual(bad, [])
})
