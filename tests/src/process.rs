//! Child processes whose output can be awaited, and which never outlive the test binary.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::PathBuf,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{
        Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};

use crate::PATIENCE;

/// Ends what is left when the test binary ends in whatever way: its stdin is a pipe from here, and
/// what it reads is `+ GROUP` and `- GROUP` for each process group that begins and ends.
const REAPER: &str = r#"
root=$1
alive=
while read -r change group; do
    rest=
    for other in $alive; do [ "$other" = "$group" ] || rest="$rest $other"; done
    alive=$rest
    if [ "$change" = + ]; then alive="$alive $group"; fi
done
for group in $alive; do kill -TERM "-$group"; done
tries=0
for group in $alive; do
    while kill -0 "-$group" && [ "$tries" -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
    kill -KILL "-$group"
done
# Agents in the background have a group of their own.
for process in /proc/[0-9]*; do
    if grep -q "CONNECT_HOME=$root/" "$process/environ"; then kill -KILL "${process#/proc/}"; fi
done
# A hub that was killed leaves its database running, for its successor.
find "$root" -name postmaster.pid | while read -r file; do
    read -r pid <"$file"
    case $(cat "/proc/$pid/comm") in
        postgres) kill -QUIT "$pid" ;;
        *) continue ;;
    esac
    while kill -0 "$pid" && [ "$tries" -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
done
rm -rf "$root"
"#;

struct Reaper {
    root: PathBuf,
    orders: Mutex<ChildStdin>,
    /// Outlives us, so nobody waits for it.
    _process: Child,
}

static REAPER_PROCESS: LazyLock<Reaper> = LazyLock::new(|| {
    let root = tempfile::Builder::new()
        .prefix("connect-tests.")
        .tempdir()
        .expect("a temporary directory")
        .keep();
    // PostgreSQL runs as another user when we are root, and has to come through.
    fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).expect("our own directory");
    let mut reaper = Command::new("sh")
        .args(["-c", REAPER, "reaper"])
        .arg(&root)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .expect("there is a shell");
    let orders = Mutex::new(reaper.stdin.take().expect("it is piped"));
    Reaper { root, orders, _process: reaper }
});

impl Reaper {
    fn tell(&self, change: char, group: u32) {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(orders, "{change} {group}").expect("the reaper listens as long as we live");
    }
}

/// A new directory, 0755, removed when the test binary ends.
#[must_use]
pub fn new_dir(purpose: &str) -> PathBuf {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let dir = REAPER_PROCESS.root.join(format!("{purpose}-{number}"));
    fs::create_dir(&dir).expect("a new name in our own directory");
    dir
}

/// One of our programs, as `make test` built it.
///
/// # Panics
/// When it is not there: a test that did not run must not look like one that passed.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let dir = std::env::var_os("CONNECT_BIN_DIR").map_or_else(
        || {
            let exe = std::env::current_exe().expect("we run");
            let dir = exe.parent().expect("a program is in a directory");
            // Tests and benchmarks are one below the programs: target/debug/deps.
            if dir.ends_with("deps") { dir.parent().expect("it has one") } else { dir }.to_owned()
        },
        PathBuf::from,
    );
    let path = dir.join(name);
    assert!(path.is_file(), "`{}` is not there: run `make test`", path.display());
    path
}

#[derive(Debug, Default)]
struct Text {
    state: Mutex<(String, bool)>,
    changed: Condvar,
}

impl Text {
    fn lock(&self) -> MutexGuard<'_, (String, bool)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn collect(self: &Arc<Self>, mut from: impl Read + Send + 'static) {
        let text = self.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            loop {
                let length = from.read(&mut buffer).unwrap_or(0);
                let mut state = text.lock();
                state.0.push_str(&String::from_utf8_lossy(&buffer[..length]));
                state.1 = length == 0;
                text.changed.notify_all();
                if length == 0 {
                    return;
                }
            }
        });
    }

    /// Waits for the end, or until `found` finds something.
    fn wait<T>(&self, mut found: impl FnMut(&str) -> Option<T>) -> Option<T> {
        let start = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some(found) = found(&state.0) {
                return Some(found);
            }
            let left = PATIENCE.checked_sub(start.elapsed())?;
            if state.1 {
                return None;
            }
            state =
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A process in a group of its own; the whole group is killed when this is dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdout: Arc<Text>,
    stderr: Arc<Text>,
}

/// What a process left behind.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// All of stdout.
    pub stdout: String,
    /// All of stderr.
    pub stderr: String,
}

impl Process {
    /// Starts a process and collects what it prints.
    pub fn spawn(name: &str, command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        REAPER_PROCESS.tell('+', child.id());
        let (stdout, stderr) = (Arc::new(Text::default()), Arc::new(Text::default()));
        stdout.collect(child.stdout.take().expect("it is piped"));
        stderr.collect(child.stderr.take().expect("it is piped"));
        Self { name: name.to_owned(), child, stdout, stderr }
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line of stdout that `found` makes something of.
    #[track_caller]
    pub fn stdout_line<T>(&self, found: impl FnMut(&str) -> Option<T>) -> T {
        self.line(&self.stdout, found)
    }

    /// Waits for a line of stderr that contains `part`.
    #[track_caller]
    pub fn stderr_line(&self, part: &str) {
        self.line(&self.stderr, |line| line.contains(part).then_some(()));
    }

    #[track_caller]
    fn line<T>(&self, text: &Text, mut found: impl FnMut(&str) -> Option<T>) -> T {
        let found = text.wait(|text| {
            let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
            whole.lines().find_map(&mut found)
        });
        found.unwrap_or_else(|| {
            panic!("{} did not say it:\n{}\n{}", self.name, self.stdout(), self.stderr())
        })
    }

    /// What it printed on stdout until now.
    #[must_use]
    pub fn stdout(&self) -> String {
        self.stdout.lock().0.clone()
    }

    /// What it printed on stderr until now.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr.lock().0.clone()
    }

    /// Writes to its stdin and closes it.
    pub fn feed(&mut self, input: &[u8]) {
        if let Some(mut stdin) = self.child.stdin.take() {
            // A process that reads nothing may be gone already.
            let _ = stdin.write_all(input);
        }
    }

    /// Sends a signal to the process alone.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("it is our child");
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("pids are small"))
    }

    /// Kills the process alone, as `kill -9` does, and waits until it is gone.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.child.wait().expect("it is our child");
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("it is our child").is_some()
    }

    /// Waits for its end, and then for all that it printed.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn outcome(mut self) -> Outcome {
        let Some(status) = self.wait(PATIENCE) else {
            panic!("{} does not end:\n{}\n{}", self.name, self.stdout(), self.stderr());
        };
        // A grandchild that goes on may hold the pipes; what counts was said before the end.
        let all = |text: &Text| {
            let start = Instant::now();
            let mut state = text.lock();
            while !state.1 && start.elapsed() < Duration::from_secs(1) {
                state = text
                    .changed
                    .wait_timeout(state, Duration::from_millis(100))
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
            state.0.clone()
        };
        Outcome { code: status.code(), stdout: all(&self.stdout), stderr: all(&self.stderr) }
    }

    /// Waits for its end, for so long.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        drop(self.child.stdin.take());
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                return Some(status);
            }
            if start.elapsed() > limit {
                return None;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let ended = matches!(self.child.try_wait(), Ok(Some(_)));
        // Children of a process that ended may live on in its group.
        let _ = killpg(self.pid(), Signal::SIGKILL);
        if !ended {
            let _ = self.child.wait();
        }
        REAPER_PROCESS.tell('-', self.child.id());
    }
}
