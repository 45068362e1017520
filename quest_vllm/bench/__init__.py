"""``quest-vllm bench``: what a token budget saves in time, over context lengths and batch sizes.

:mod:`~quest_vllm.bench.cli` reads the command line, :mod:`~quest_vllm.bench.run` drives servers
(:mod:`~quest_vllm.bench.server`) through rounds (:mod:`~quest_vllm.bench.measure`), :mod:`~quest_vllm.bench.summary`
makes cells of them, :mod:`~quest_vllm.bench.plot` draws those.
"""
