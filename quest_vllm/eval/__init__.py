"""``quest-vllm eval``: what a token budget costs in quality, on a user's own model.

Tasks are generated from a seed (:mod:`.tasks`), built to an exact number of tokens (:mod:`.prompts`), answered over
HTTP (:mod:`.http_runner`) or in process (:mod:`.engine_runner`), scored (:mod:`.scoring`), and compared item by item
with dense attention in the same run (:mod:`.stats`, :mod:`.report`).
"""
