#!/usr/bin/env bash
# Installs what longhand needs from the distribution (Debian 12 or newer, Ubuntu 24.04 or newer), and the packages named behind it; does
# nothing where all is there.
set -euo pipefail

packages=(g++ cmake ninja-build pkg-config libfmt-dev doctest-dev libzstd-dev nlohmann-json3-dev libcli11-dev
          libtomlplusplus-dev libpcre2-dev libutf8proc-dev libopenblas-dev libopenmpi-dev openmpi-bin "$@")

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  exit 0
fi

echo "installing: ${missing[*]}" >&2
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "error: not root and no sudo; install by hand: ${missing[*]}" >&2; exit 1; }
  as_root=(sudo)
fi
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
