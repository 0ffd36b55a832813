"""llama.cpp's server with the options that `export` prints; runs in `.venv-llama-cpp`, and prints its address."""

import argparse
import threading

import xllamacpp

options = argparse.ArgumentParser()
options.add_argument("-m", dest="model", required=True)
options.add_argument("--lora", default="")
options.add_argument("--lora-init-without-apply", action="store_true")
options.add_argument("--cache-ram", type=int, default=8192)  # as the server does
options = options.parse_args()

settings = xllamacpp.CommonParams()
settings.model.path, settings.port = options.model, 0
settings.n_ctx, settings.n_parallel, settings.warmup = 2048, 2, False
# threads that wait for each other spin, which takes minutes on a busy machine
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
settings.lora_adapters = [
    xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in filter(None, options.lora.split(","))
]
settings.cache_ram_mib = options.cache_ram
settings.lora_init_without_apply = options.lora_init_without_apply
server = xllamacpp.Server(settings)
print(server.listening_address, flush=True)
threading.Event().wait()
