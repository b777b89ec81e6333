// What the tests of this folder share: a browser with a fresh profile, pages that are watched, screenshots, and the server of `make lab`.
import { spawn } from 'node:child_process'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { chromium } from 'playwright-core'

export const root = resolve(fileURLToPath(import.meta.url), '../../..')
export const address = path => pathToFileURL(join(root, path)).href

const flags = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']

/** A browser for the tests of one file, closed when they are done; playwright gives it a profile of its own. */
export async function browser(t) {
  const started = await chromium.launch({ executablePath: process.env.CHROMIUM || '/usr/bin/chromium', headless: true, args: flags })
  t.after(() => started.close())
  return started
}

/** An empty page and what must not happen on it: errors, and requests that leave this machine. */
export async function watched(browser, { width = 1300, height = 900, ...options } = {}) {
  const context = await browser.newContext({ viewport: { width, height }, ...options })
  const page = await context.newPage(), errors = [], outside = []
  page.on('pageerror', error => errors.push(error.message))
  page.on('console', message => { if (message.type() === 'error') errors.push(message.text()) })
  page.on('request', request => { if (!/^(file|data|blob|about):|^(https?|wss?):\/\/(127\.0\.0\.1|localhost)[:/]/.test(request.url())) outside.push(request.url()) })
  return { page, errors, outside }
}

/** Screenshots at the width of a telephone and of a desk; of the whole page, or of the window with `anchor` in it. */
export async function shots(page, name, { whole = true, anchor } = {}) {
  await mkdir(join(root, 'build/screenshots'), { recursive: true })
  for (const width of [400, 1300]) {
    await page.setViewportSize({ width, height: 900 })
    if (anchor) await anchor.scrollIntoViewIfNeeded()
    await page.waitForTimeout(anchor ? 800 : 150)
    await page.screenshot({ path: join(root, `build/screenshots/${name}-${width}.png`), fullPage: whole })
  }
}

/** How many pixels a page is wider than a telephone of 400. */
export async function overflow(page) {
  await page.setViewportSize({ width: 400, height: 900 })
  return page.evaluate(() => document.documentElement.scrollWidth - innerWidth)
}

async function freePort() {
  const server = createServer().listen(0, '127.0.0.1')
  await new Promise(done => server.once('listening', done))
  const { port } = server.address()
  await new Promise(done => server.close(done))
  return port
}

/** A home for a server, in which JupyterLab draws all cells at once and does not save by itself what a test runs in the notebooks of the checkout. */
async function freshHome() {
  const home = await mkdtemp(join(tmpdir(), 'robust-dml-lab-'))
  for (const [plugin, settings] of [['docmanager-extension/plugin', { autosave: false }], ['notebook-extension/tracker', { windowingMode: 'none' }]]) {
    const file = join(home, `.jupyter/lab/user-settings/@jupyterlab/${plugin}.jupyterlab-settings`)
    await mkdir(resolve(file, '..'), { recursive: true })
    await writeFile(file, JSON.stringify(settings))
  }
  return home
}

/** JupyterLab as `make lab` starts it, with a home of its own; its address and token. */
export async function lab(t, { limit = 90 } = {}) {
  const home = await freshHome(), port = await freePort(), token = 'browser-test'
  const options = `--no-browser --allow-root --ServerApp.port=${port} --ServerApp.port_retries=0 --IdentityProvider.token=${token}`
  const server = spawn('make', ['-s', 'lab', `LAB=${options}`], { cwd: root, detached: true, env: { ...process.env, HOME: home, MAKEFLAGS: '' }, stdio: ['ignore', 'pipe', 'pipe'] })
  let said = ''
  for (const stream of [server.stdout, server.stderr]) stream.on('data', text => { said += text })
  t.after(async () => {
    try { process.kill(-server.pid, 'SIGTERM') } catch { /* it has ended */ }
    await Promise.race([new Promise(done => server.once('exit', done)), sleep(10_000)])
    await rm(home, { recursive: true, force: true, maxRetries: 5 })
  })
  const base = `http://127.0.0.1:${port}`
  for (let i = 0; i < 2*limit; i++) {
    if (server.exitCode !== null) break
    try { if ((await fetch(`${base}/api/status?token=${token}`)).ok) return { base, token } } catch { /* not yet */ }
    await sleep(500)
  }
  throw new Error(`make lab must answer within ${limit} s, found: ${said.slice(-1500)}`)
}
