"""llama.cpp's server on a GGUF file, from the package `xllamacpp`, to compare `retro-run serve` with (load.py).

    pip install xllamacpp
    python tests/python/llama_server.py MODEL.gguf --parallel 8 --ctx-size 5120 --threads 2
"""

import argparse
import signal

import xllamacpp


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--port", type=int, default=8081)
    parser.add_argument("--parallel", type=int, default=8, help="requests that run at a time")
    parser.add_argument("--ctx-size", type=int, default=5120, help="tokens of prompt and output of a request")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.hostnames = ["127.0.0.1"]
    params.port = options.port
    params.n_parallel = options.parallel
    # Of all slots together.
    params.n_ctx = options.parallel * options.ctx_size
    params.kv_unified = False
    params.cpuparams.n_threads = options.threads
    params.cpuparams_batch.n_threads = options.threads
    params.verbosity = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
