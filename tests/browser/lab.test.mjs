// JupyterLab as `make lab` starts it: the start page opens, and notebooks run from top to bottom.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { browser, lab, shots, watched } from './common.mjs'

const cells = '.jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell'

/** Open a notebook in a page of its own, with a fresh workspace. */
async function opened(chromium, { base, token }, path) {
  const { page, outside } = await watched(chromium)
  await page.goto(`${base}/${path ? `lab/tree/${path}` : ''}?token=${token}&reset`, { waitUntil: 'domcontentloaded' })
  await page.waitForSelector(cells, { timeout: 90_000 })
  return { page, outside }
}

/** Run all cells and wait until the kernel has answered the last one; the server knows, the icon is early. */
async function runAll(page, { base, token }, path, limit = 240_000) {
  const state = async () => {
    const sessions = await (await page.request.get(`${base}/api/sessions?token=${token}`)).json()
    return sessions.find(s => s.path === path && s.kernel.connections > 0)?.kernel.execution_state
  }
  const until = async (what, test, wait) => {
    for (const end = Date.now() + wait; !(await test()); await page.waitForTimeout(400)) if (Date.now() > end) throw new Error(`${path} must ${what} within ${wait/1000} s`)
  }
  await until('have a kernel', async () => await state() === 'idle', 90_000)
  await page.getByRole('menuitem', { name: 'Run', exact: true }).click()
  await page.getByRole('menuitem', { name: /^Run All Cells/ }).click()
  const open = () => page.locator(`${cells}.jp-CodeCell .jp-InputPrompt`).evaluateAll(prompts => prompts.filter(p => /\[[ *]\]/.test(p.textContent) && p.closest('.jp-Cell').querySelector('.cm-content')?.textContent.trim()).length)
  await until('run all its cells', async () => await state() === 'idle' && await open() === 0, limit)
}

/** What a reader sees of the outputs. */
async function outputs(page) {
  await page.waitForTimeout(500)
  const output = `${cells} .jp-OutputArea-output`
  return {
    figures: await page.locator(`${output} img`).evaluateAll(images => images.filter(i => i.naturalWidth > 100).length),
    errors: await page.locator(`${output}[data-mime-type="application/vnd.jupyter.error"]`).allInnerTexts() }
}

test('JupyterLab', async t => {
  const server = await lab(t), chromium = await browser(t)

  await t.test('the start page opens, without announcements', async () => {
    const { page, outside } = await opened(chromium, server, '')
    await page.waitForURL(/tree\/nbs\/index\.ipynb/, { timeout: 60_000 })
    assert.match(await page.locator(`${cells} h1`).first().innerText(), /robust_dml/)
    await runAll(page, server, 'nbs/index.ipynb')
    assert.deepEqual((await outputs(page)).errors, [])
    assert.equal(await page.locator('.Toastify__toast, .jp-Dialog').count(), 0, 'a pop-up')
    await shots(page, 'lab-index', { whole: false, anchor: page.locator(cells).first() })
    assert.deepEqual(outside, [])
    await page.getByRole('link', { name: '02 distances' }).click()
    await page.waitForSelector('.jp-NotebookPanel:not(.lm-mod-hidden) h1:has-text("Distances")', { timeout: 60_000 })
    await page.context().close()
  })

  for (const name of ['triplets/00_distances', 'triplets/02_collapse', 'attacks/01_suite']) {
    await t.test(`${name} runs from top to bottom and shows a figure`, async () => {
      const { page } = await opened(chromium, server, `nbs/${name}.ipynb`)
      await runAll(page, server, `nbs/${name}.ipynb`)
      const { figures, errors } = await outputs(page)
      assert.deepEqual(errors, [])
      assert.ok(figures > 0, 'a figure')
      await shots(page, `lab-${name}`, { whole: false, anchor: page.locator(`${cells} .jp-OutputArea-output img`).last() })
      await page.context().close()
    })
  }
})
