"""What quest_vllm adds to vLLM's OpenAI-compatible HTTP API: one ASGI middleware and its parts.

Load it with ``--middleware quest_vllm.server.middleware.QuestMiddleware``; ``quest-vllm serve`` does. For its users:
docs/api.md.
"""
