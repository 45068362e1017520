"""LangChain's ChatOpenAI and LiteLLM against a running server: ``python third_party_clients.py BASE_URL KEY MODEL``.

Knows nothing of quest_vllm, so that it can run where only ``langchain-openai`` and ``litellm`` are installed. Prints
``ok`` as its last line; any failure is an exception.
"""

from __future__ import annotations

import asyncio
import sys

import litellm
from langchain_openai import ChatOpenAI

QUESTION = "river stone letter market " * 100 + "What was the first word?"
SPARSE = {"sparse_attention": {"token_budget": 128}}


def langchain(base_url: str, key: str, model: str) -> None:
    """Whole, streamed, asynchronous and aliased; the budget comes back in LangChain's own metadata."""
    common = {"base_url": base_url, "api_key": key, "max_tokens": 8, "temperature": 0, "max_retries": 0}
    chat = ChatOpenAI(model=model, extra_body=SPARSE, stream_usage=True, **common)
    for answer in (chat.invoke(QUESTION), asyncio.run(chat.ainvoke(QUESTION))):
        usage = answer.response_metadata["token_usage"]["sparse_attention"]
        assert usage["token_budget"] == 128 and usage["pages_selected"] == 8 * usage["decode_steps"], usage
    chunks = list(chat.stream(QUESTION))
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) > 1
    aliased = ChatOpenAI(model=f"{model}:fast", **common).invoke(QUESTION)
    assert aliased.response_metadata["model_name"] == f"{model}:fast"
    assert aliased.response_metadata["token_usage"]["sparse_attention"]["token_budget"] == 512
    print("langchain:", usage)


def lite(base_url: str, key: str, model: str) -> None:
    """Whole and streamed, and a refusal that arrives as LiteLLM's own BadRequestError."""
    messages = [{"role": "user", "content": QUESTION}]
    common = {"api_base": base_url, "api_key": key, "messages": messages, "max_tokens": 8, "num_retries": 0}
    answer = litellm.completion(model=f"openai/{model}", extra_body=SPARSE, **common)
    usage = answer.usage.model_dump()["sparse_attention"]
    assert usage["token_budget"] == 128, usage
    streamed = litellm.completion(
        model=f"openai/{model}:fast", stream=True, stream_options={"include_usage": True}, **common
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    try:
        litellm.completion(model=f"openai/{model}", extra_body={"sparse_attention": {"token_budget": 1}}, **common)
    except litellm.BadRequestError as error:
        assert "sparse_attention.token_budget" in str(error)
    else:
        raise AssertionError("a budget of 1 was taken")
    print("litellm:", usage)


if __name__ == "__main__":
    langchain(*sys.argv[1:4])
    lite(*sys.argv[1:4])
    print("ok")
