# docker build --tag dst-td3 . && docker run --volume "$PWD/runs:/runs" dst-td3 --quick
FROM debian:bookworm-slim

# Each run notes the commit that made it, hence git; videos are drawn by OpenGL without a screen.
RUN apt-get update && apt-get install --yes --no-install-recommends \
    git libegl1 libgl1-mesa-dri libopengl0 make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Installed before the code is copied, so that a change of code rebuilds in seconds. With the address of PyTorch's CPU
# packages, `--build-arg TORCH_INDEX=ADDRESS`, torch alone comes from there and brings no CUDA libraries.
ARG TORCH_INDEX
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.txt constraints.txt /tmp/
RUN python3 -m venv /opt/venv && cd /tmp \
    && if [ -n "$TORCH_INDEX" ]; then \
         pip install --no-deps --index-url "$TORCH_INDEX" "$(grep ^torch= requirements.txt)"; \
       fi \
    && pip install -r requirements.txt -c constraints.txt

# Runs go where /runs is mounted. It is open to all, so that `docker run --user "$(id -u)"` can leave them to
# their owner.
ENV HOME=/home/user
RUN useradd --no-create-home user && install --directory --mode=777 /home/user /runs

WORKDIR /dst-td3
COPY . .
# The committed results stay outside the image, which is no change of the code.
RUN ln -sT /runs runs && git config --system --add safe.directory /dst-td3 \
    && if [ -d .git ]; then git ls-files -z results | git update-index -z --skip-worktree --stdin; fi
USER user

# Options are for run_all.sh; anything else is a command: docker run dst-td3 python dst_td3.py --env Hopper-v4
ENTRYPOINT ["bash", "-c", "if [[ -z $1 || $1 == -* ]]; then set -- ./run_all.sh \"$@\"; fi; exec \"$@\"", "bash"]
