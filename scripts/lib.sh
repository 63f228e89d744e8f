# Shared by the scripts in this folder; sourced, never run.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${FERRY_VENV:-$root/.venv}

say() { printf 'setup: %s\n' "$*" >&2; }

# die MESSAGE [HINT]: one line that names the thing and the cause, then the remedy in brackets.
die() {
  printf 'setup: error: %s\n' "$1" >&2
  [ $# -lt 2 ] || printf '  (%s)\n' "$2" >&2
  exit 1
}

# version_ge A B: true if the dotted version A is B or newer.
version_ge() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# need_space DIR MIB WHAT: refuse early instead of failing half-way.
need_space() {
  local dir=$1 free
  while [ ! -d "$dir" ]; do dir=$(dirname "$dir"); done
  free=$(df -Pm "$dir" | awk 'NR == 2 {print $4}')
  [ "$free" -ge "$2" ] || die "no space in $dir for $3: $free MiB free, $2 MiB needed" "free some space there and run this again"
}

os_release() { . /etc/os-release 2>/dev/null && printf '%s %s' "${ID:-unknown}" "${ID_LIKE:-}"; }

# debian_mirror: the mirror that apt is set up with.
debian_mirror() {
  apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
    sed -n 's/^Debian|Debian|main|//p' | head -n 1
}

# guest_machine: set arch, qemu, qemu_package, machine, console and accel for QEMU guests of this machine's architecture.
guest_machine() {
  # A /dev/kvm that is there does not mean that guests start with it: software emulation always does.
  accel=${FERRY_GUEST_ACCEL:-tcg,thread=multi}
  case $(uname -m) in
    x86_64) arch=amd64 qemu=qemu-system-x86_64 qemu_package=qemu-system-x86 machine='-M q35 -cpu max' console=ttyS0 ;;
    aarch64) arch=arm64 qemu=qemu-system-aarch64 qemu_package=qemu-system-arm machine='-M virt -cpu max' console=ttyAMA0 ;;
    *) die "no guest for the architecture $(uname -m)" ;;
  esac
  # Emulating an older processor costs less than emulating all that there is.
  case $qemu:$accel in *x86_64:tcg*) machine='-M q35 -cpu Westmere' ;; esac
}

# project_tar: this project on stdout: what is committed or new, not what was built here.
project_tar() { (cd "$root" && git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read --owner=0 --group=0 -c -T - 2>/dev/null); }
