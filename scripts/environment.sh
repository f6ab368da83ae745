# Sourced by the other scripts: makes .venv at the root (once) and installs the given requirement files into it.
# usage: source scripts/environment.sh REQUIREMENTS...
python3 -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' ||
  { echo "Python must be 3.10 to 3.12, got $(python3 --version)" >&2; exit 1; }
[ -x .venv/bin/python ] || python3 -m venv .venv
for requirements in "$@"; do
  stamp=.venv/$(basename "$requirements").installed
  if ! cmp -s "$requirements" "$stamp"; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    cp "$requirements" "$stamp"
  fi
done
# MindSpore's compiler takes and frees small blocks of memory by the million: kept by each thread, they make
# compiling a tenth to a sixth faster
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.tcache_count=5000:glibc.malloc.tcache_max=1024}
