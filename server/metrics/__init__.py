"""What the server and its engine did, for Prometheus.

    records.py     what the server itself notes: requests, how they ended, refusals, latencies
    state.py       what one scrape sees, read at one moment
    families.py    values -> the families of prometheus_client
    native.py      -> quire_*
    vllm.py        -> vllm:*, for boards and gateways that know those names
    collector.py   Metrics: all of it

Knows EngineSnapshot, HTTP outcomes and metric names; does not know routes or replies. Base units, and labels
from fixed sets only: whatever a client sends, the number of series stays the same. `docs/metrics.md` says
what each one tells.
"""

from server.metrics.collector import CONTENT_TYPE, Metrics
from server.metrics.native import WHATIF_KEYS
from server.metrics.records import APIS, OUTCOMES, REFUSALS, RequestMetrics

__all__ = [
    "APIS",
    "CONTENT_TYPE",
    "OUTCOMES",
    "REFUSALS",
    "WHATIF_KEYS",
    "Metrics",
    "RequestMetrics",
]
