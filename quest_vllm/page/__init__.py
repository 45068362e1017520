"""The page at ``/quest``: one prompt, several budgets side by side, and a map of the pages that each layer read.

Off unless ``quest-vllm serve --quest-page``. :mod:`~quest_vllm.page.routes` answers the browser in the API server;
:mod:`~quest_vllm.page.trace` carries the map from the worker.
"""
