# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154
# Sourced by `demo`, `acceptance`, `rest` and `soak`: a hub and two agents in a directory of their own, and their end.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/packages.sh
. "$root/scripts/packages.sh"

PATH=$PATH:${HOME:-/root}/.cargo/bin
# What the caller's shell says of its own databases and agents is not for these.
for variable in $(compgen -e | grep -E '^(PG|CONNECT_HUB_|CONNECT_HOME$|CONNECT_INVITE$)' || true); do
    [ "$variable" = CONNECT_HUB_PG_BIN ] || unset "$variable"
done

bold='' dim='' red='' green='' plain=''
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
    bold=$'\e[1m' dim=$'\e[2m' red=$'\e[31m' green=$'\e[32m' plain=$'\e[0m'
fi

current_step=start
step() {
    current_step=$1
    printf '%s==>%s %s\n' "$bold" "$plain" "$1"
}

# Ends the run; the trap below says in which step.
die() {
    current_step="$current_step: $*"
    exit 1
}

# --- What is started, and its end -----------------------------------------------------------------

groups=()

# start LOG COMMAND…: in the background, in a process group of its own, so that all of it can be ended
# and Ctrl-C reaches this script first. Sets $started.
start() {
    local log=$logs/$1
    shift
    set -m
    "$@" </dev/null >>"$log" 2>&1 &
    started=$!
    set +m
    groups+=("$started")
}

# stop GROUP: asks, waits, insists.
stop() {
    kill -TERM -- "-$1" 2>/dev/null || return 0
    local tenths
    for ((tenths = 0; tenths < 150; tenths++)); do
        kill -0 -- "-$1" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL -- "-$1" 2>/dev/null || true
}

stop_all() {
    local at
    # The last started goes first: agents before the hub.
    for ((at = ${#groups[@]} - 1; at >= 0; at--)); do
        stop "${groups[at]}"
    done
    groups=()
    # A hub that had to be killed leaves its cluster, which has a process group of its own.
    local pid_file
    while IFS= read -r pid_file; do
        kill -QUIT "$(head -n 1 "$pid_file")" 2>/dev/null || true
    done < <(find "$state" -maxdepth 4 -name postmaster.pid 2>/dev/null)
}

show_logs() {
    local log
    for log in "$logs"/*; do
        if [ -s "$log" ]; then
            printf '\n%s--- the end of %s%s\n' "$dim" "${log##*/}" "$plain" >&2
            tail -n 15 "$log" | cut -c 1-400 >&2
        fi
    done
}

on_exit() {
    local status=$?
    trap - EXIT
    trap '' INT TERM HUP
    if [ "$status" != 0 ]; then
        show_logs
        printf '\n%sFAILED%s: %s\n' "$red" "$plain" "$current_step" >&2
    fi
    stop_all
    rm -rf "$state"
    exit "$status"
}

# begin NAME: the directory that everything lives in. Outside the clone, and open to pass through, for
# as root PostgreSQL runs as another user.
begin() {
    state=$(mktemp -d "${TMPDIR:-/tmp}/connect-$1.XXXXXX")
    chmod 755 "$state"
    logs=$state/logs
    mkdir "$logs"
    trap on_exit EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}

# wait_for SECONDS PID WHAT COMMAND…: until the command succeeds, as long as the process lives.
wait_for() {
    local limit=$((SECONDS + $1)) pid=$2 what=$3
    shift 3
    until "$@" >/dev/null 2>&1; do
        kill -0 "$pid" 2>/dev/null || die "$what ended"
        [ "$SECONDS" -lt "$limit" ] || die "$what did not come up in time"
        sleep 0.1
    done
}

# --- Ports and HTTP, with nothing but bash --------------------------------------------------------

listens() {
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# free_port: sets $port to one where nothing listens, below those that the kernel gives to clients.
free_port() {
    local tries
    for ((tries = 0; tries < 50; tries++)); do
        port=$((20000 + (RANDOM * 32768 + RANDOM) % 12000))
        case " ${given_ports:-} " in *" $port "*) continue ;; esac
        if ! listens "$port"; then
            given_ports="${given_ports:-} $port"
            return
        fi
    done
    die "no free port on 127.0.0.1"
}

http_ok() {
    (
        exec 3<>"/dev/tcp/127.0.0.1/$1"
        printf 'GET %s HTTP/1.1\r\nHost: 127.0.0.1:%s\r\nConnection: close\r\n\r\n' "$2" "$1" >&3
        read -r -t 5 status <&3
        [[ $status == 'HTTP/1.1 200'* ]]
    ) 2>/dev/null
}

random_word() {
    od -An -N12 -tx1 /dev/urandom | tr -d ' \n'
}

# --- The parts ------------------------------------------------------------------------------------

# Sets $bin and $pg_bin. CONNECT_BIN_DIR names binaries that are built already.
build_binaries() {
    if [ -n "${CONNECT_BIN_DIR:-}" ]; then
        bin=$(cd "$CONNECT_BIN_DIR" && pwd)
    else
        "$root/scripts/toolchain"
        (cd "$root" && cargo build --release --locked --bins)
        bin=$(cd "$root" && cd "${CARGO_TARGET_DIR:-target}" && pwd)/release
    fi
    local program
    for program in connect connect-hub; do
        [ -x "$bin/$program" ] || die "\`$bin/$program\` is not there"
    done
    pg_bin=$(cd "$root" && scripts/postgres)
    export CONNECT_HUB_PG_BIN=$pg_bin
}

# start_hub [ARGUMENT…]: sets $hub_port, $hub_pid and $hub_dir.
start_hub() {
    local admin_port
    [ -n "${hub_port:-}" ] || { free_port && hub_port=$port; }
    free_port && admin_port=$port
    hub_dir=$state/hub
    start hub.log "$bin/connect-hub" serve --listen "127.0.0.1:$hub_port" \
        --admin-listen "127.0.0.1:$admin_port" --data-dir "$hub_dir" "$@"
    hub_pid=$started
    wait_for 60 "$hub_pid" "the hub" http_ok "$admin_port" /readyz
}

# as AGENT ARGUMENT…: runs `connect` in the agent's home.
as() {
    local agent=$1
    shift
    CONNECT_HOME=$state/$agent "$bin/connect" "$@" 2>>"$logs/$agent.log"
}

# enrol URL: the laptop makes a workspace and invites the server; both come up.
enrol() {
    local code
    # The answer holds the recovery words.
    (umask 077 && as laptop init --hub "$1" >"$state/recovery-words")
    code=$(as laptop invite)
    as server join "$code" --label "$server_label" >/dev/null
    start laptop.log env CONNECT_HOME="$state/laptop" "$bin/connect" up
    wait_for 30 "$started" "the laptop's agent" as laptop status
    start server.log env CONNECT_HOME="$state/server" "$bin/connect" up
    wait_for 30 "$started" "the server's agent" as server status
}

# reach NAME: sets $reached to the local address.
reach() {
    reached=$(as laptop reach "$1" | tail -n 1)
    [[ $reached =~ ^[^:]+:[0-9]+$ ]] || die "\`connect reach $1\` printed no address but \`$reached\`"
}

# PostgreSQL refuses to run as root: sets ${as_pg[@]} to the words that make it run as somebody else.
pg_user() {
    as_pg=()
    if [ "$(id -u)" = 0 ]; then
        local user=nobody
        if id postgres >/dev/null 2>&1; then user=postgres; fi
        as_pg=(setpriv "--reuid=$user" "--regid=$(id -g "$user")" --clear-groups)
    fi
}

# start_database [ADDRESS PORT]: a throwaway one on a TCP port of loopback. Sets $db_port and exports PGPASSWORD.
start_database() {
    local db_address=${1:-127.0.0.1}
    pg_user
    if [ -n "${2:-}" ]; then db_port=$2; else free_port && db_port=$port; fi
    db_dir=$state/database
    # Other users of this machine see the port too, hence a password.
    PGPASSWORD=$(random_word)
    export PGPASSWORD PGUSER=postgres PGDATABASE=postgres PGCONNECT_TIMEOUT=10
    mkdir -m 700 "$db_dir"
    printf '%s\n' "$PGPASSWORD" >"$db_dir/password"
    if [ ${#as_pg[@]} -gt 0 ]; then chown -R "${as_pg[1]#*=}" "$db_dir"; fi
    (cd / && ${as_pg[@]+"${as_pg[@]}"} "$pg_bin/initdb" -D "$db_dir/data" -U postgres --encoding=UTF8 --locale=C \
        --auth=scram-sha-256 --pwfile="$db_dir/password" --no-sync) </dev/null >"$logs/database.log" 2>&1
    cd /
    start database.log ${as_pg[@]+"${as_pg[@]}"} "$pg_bin/postgres" -D "$db_dir/data" -p "$db_port" \
        -c listen_addresses="$db_address" -c unix_socket_directories= -c max_connections=50 -c fsync=off
    cd "$root"
    wait_for 30 "$started" "the throwaway database" sql "$db_address:$db_port" -c 'select 1'
}

# sql ADDRESS ARGUMENT…: psql at host:port.
sql() {
    local address=$1
    shift
    "$pg_bin/psql" -X -q -v ON_ERROR_STOP=1 -h "${address%:*}" -p "${address##*:}" "$@" </dev/null
}
