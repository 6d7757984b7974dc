# shellcheck shell=sh
# Sourced by the other scripts: installing packages of the operating system, asking nobody who cannot answer.

say() {
    printf '%s\n' "$*" >&2
}

# Sets $as_root to the words that run a command as root: none, or those of sudo.
# Fails where there is neither, so that the caller can say what is missing.
become_root() {
    if [ "$(id -u)" = 0 ]; then
        as_root=
    elif ! command -v sudo >/dev/null 2>&1; then
        return 1
    elif sudo -n true 2>/dev/null; then
        as_root='sudo -n'
    elif [ -t 0 ] && [ -t 2 ]; then
        say "sudo may ask for your password; Ctrl-D to go on without it."
        sudo -v >&2 || return 1
        as_root=sudo
    else
        return 1
    fi
}

# Prints the name of the package manager.
package_manager() {
    for manager in apt-get dnf apk pacman; do
        if command -v "$manager" >/dev/null 2>&1; then
            echo "$manager"
            return
        fi
    done
    return 1
}

# install_packages NAME…: as root, which become_root has arranged. Standard output stays clean.
install_packages() {
    # $as_root is zero or more words.
    # shellcheck disable=SC2086
    case $(package_manager) in
    apt-get)
        # A source that does not answer is no reason to stop: the packages may be in another.
        $as_root apt-get -q -o DPkg::Lock::Timeout=120 update >&2 || say "apt-get update failed; trying with the old lists."
        $as_root env DEBIAN_FRONTEND=noninteractive UCF_FORCE_CONFFOLD=1 apt-get -q -y \
            -o DPkg::Lock::Timeout=120 -o Dpkg::Options::=--force-confold \
            install --no-install-recommends "$@" </dev/null >&2
        ;;
    dnf) $as_root dnf -q -y install "$@" </dev/null >&2 ;;
    apk) $as_root apk add --no-progress "$@" </dev/null >&2 ;;
    pacman) $as_root pacman -S --noconfirm --needed "$@" </dev/null >&2 ;;
    *) return 1 ;;
    esac
}
