"""The four operations of Quest decoding; call them through :mod:`quest_vllm.ops.api`."""
