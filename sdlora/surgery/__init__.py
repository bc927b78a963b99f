"""Surgery on adapters: merge, resize, bake, extract, convert and compare, exact unless a cut is asked for.

One module an operation. All of them act on canonical adapters, so that every format of
:data:`sdlora.formats.table.FORMATS` goes in and comes out. What is shared: ``factors`` the arithmetic of
low-rank updates, ``result`` from updates to a file's pairs, ``sources`` reading and proven writing,
``report`` what was done to each module.
"""
