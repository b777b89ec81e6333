// Committed reports open from the file system: nothing is loaded from elsewhere, nothing fails, tables and figures are there.
import assert from 'node:assert/strict'
import { readdirSync, existsSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { address, browser, overflow, root, shots, watched } from './common.mjs'

const pages = readdirSync(join(root, 'reports')).filter(name => existsSync(join(root, 'reports', name, 'index.html')) && !name.startsWith('explorer-'))
const shown = ['table1-glyphs-quick', 'stress-glyphs-quick', 'claims']

test('reports', async t => {
  const chromium = await browser(t)
  assert.ok(pages.includes('table1-glyphs-quick'))
  for (const name of pages) {
    await t.test(name, async () => {
      const { page, errors, outside } = await watched(chromium)
      await page.goto(address(`reports/${name}/index.html`))
      assert.ok((await page.locator('h1').innerText()).length > 3)
      assert.ok(await page.locator('table tbody tr').count() > 1, 'a table')
      const broken = await page.locator('img').evaluateAll(images => images.filter(i => !i.complete || i.naturalWidth < 50).length)
      assert.equal(broken, 0, 'pictures that are not there')
      if (name === 'table1-glyphs-quick') {
        assert.ok(await page.locator('figure img').count() >= 3, 'figures')
        assert.match(await page.locator('table').first().innerText(), /COLO-TRIDE \(official\)/)
      }
      assert.deepEqual(errors, [])
      assert.deepEqual(outside, [])
      if (shown.includes(name)) await shots(page, `report-${name}`)
      assert.ok(await overflow(page) <= 0, 'no sideways scrolling on a telephone')
      await page.context().close()
    })
  }
})
