#!/bin/sh
# Makes a folder with Debian's Python for arm64 and the wheels that `tests.portability.emulated aarch64` needs.
# Nothing is installed on this machine.
#
#   tests/portability/arm64_root.sh FOLDER       about 450 MB; needs apt-get, dpkg, pip and unzip
set -eu
folder=$1
mkdir -p "$folder/apt/lists/partial" "$folder/apt/archives/partial" "$folder/site" "$folder/wheels"
folder=$(cd "$folder" && pwd)
: > "$folder/apt/status"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.pgp] http://deb.debian.org/debian trixie main" \
  > "$folder/apt/sources.list"
foreign() {
  apt-get -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$folder/apt" \
    -o Dir::State::Lists="$folder/apt/lists" -o Dir::State::status="$folder/apt/status" -o Dir::Cache="$folder/apt" \
    -o Dir::Cache::archives="$folder/apt/archives" -o Dir::Etc::sourceparts=- \
    -o Dir::Etc::sourcelist="$folder/apt/sources.list" -o Debug::NoLocking=1 "$@"
}
foreign update
foreign install -y --download-only --no-install-recommends python3.13 libstdc++6
for package in "$folder"/apt/archives/*.deb; do dpkg -x "$package" "$folder"; done
ln -sfn usr/lib "$folder/lib"
platforms=$(for version in 17 24 27 28; do printf ' --platform manylinux_2_%s_aarch64' $version; done)
python3 -m pip download -q --only-binary=:all: --python-version 3.13 --implementation cp --abi cp313 \
  $platforms --platform manylinux2014_aarch64 -d "$folder/wheels" \
  'apache-tvm>=0.27,<0.28' 'apache-tvm-ffi>=0.1.14.post1,!=0.1.15.post2' 'numpy>=2.0' networkx rich typer
for wheel in "$folder"/wheels/*.whl; do unzip -qo "$wheel" -d "$folder/site"; done
