"""Turns notebooks, modules and committed reports into the sources of the HTML pages; needs no Sphinx."""
