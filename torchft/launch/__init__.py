"""Real replica groups on this machine: start them by torchrun, kill, restart and watch them."""

from torchft.lazy_names import old_modules

old_modules(
    __name__,
    {
        "bytes_lm": "torchft.toy.byte_model",
        "corpus": "torchft.toy.corpus",
        "inside": "torchft.script.ranks",
        "network": "torchft.network_namespaces",
        "shell": "torchft.script.command",
        "text": "torchft.toy.text",
        "together": "torchft.script.finish_barrier",
    },
    Together="FinishBarrier",
)
