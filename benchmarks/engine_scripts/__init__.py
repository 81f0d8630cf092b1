"""Engines as programs that are called alike, each in an environment of its own:

    SCRIPT MODEL

Each line of standard input is a list of prompts, lists of token ids, and a number of new tokens: ``[prompts, new]``.
The answer is a line: the seconds from the prompts to the last of the new tokens, all prompts at the same time, greedily and
past any end-of-sequence token. The first line is written when the model is loaded.
"""
