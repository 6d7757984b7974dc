//! The private PostgreSQL cluster that the hub runs under its data directory when it is given no
//! `--database-url`.
//!
//! The cluster is the ordinary server, found on the machine, with the ordinary durability; only its
//! doors differ: no TCP, `trust` on a Unix socket in a directory that nobody else can enter. It runs
//! in a process group of its own, so that Ctrl-C reaches the hub first, and it outlives a hub that is
//! killed: the next one adopts it. Layout of the data directory:
//!
//! ```text
//! hub.lock        held by the hub that runs here; its process id, for people
//! postgres/       PGDATA
//! postgres.log    what the server says
//! socket/         the Unix socket (in the temporary directory when this path would be too long)
//! ```

use std::{
    env,
    ffi::{OsStr, OsString},
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::{
        DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
    },
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::{Gid, Pid, Uid, User, chown},
};
use sha2::{Digest as _, Sha256};
use sqlx::{
    ConnectOptions as _, Connection as _,
    postgres::{PgConnectOptions, PgConnection, PgSslMode},
};
use tokio::{
    process::{Child, Command},
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::limits::OLDEST_POSTGRES;

/// Where the server binaries are looked for when they are not in `PATH`; `*` stands for one path
/// component or the rest of one.
const BIN_PLACES: [&str; 9] = [
    "/usr/lib/postgresql/*/bin",          // Debian, Ubuntu
    "/usr/pgsql-*/bin",                   // the PostgreSQL project's RPMs
    "/usr/lib/postgresql*/bin",           // SUSE
    "/usr/libexec/postgresql*",           // Alpine
    "/usr/lib64/postgresql-*/bin",        // Gentoo
    "/usr/bin",                           // Fedora, Arch
    "/usr/local/pgsql/bin",               // built by hand
    "/opt/homebrew/opt/postgresql@*/bin", // macOS on ARM
    "/usr/local/opt/postgresql@*/bin",    // macOS on Intel
];

/// The longest socket directory: `sun_path` has 104 bytes on some systems, and PostgreSQL appends
/// `/.s.PGSQL.5432` to it.
const MAX_SOCKET_DIR_BYTES: usize = 85;

/// Only a part of the socket's file name; nothing listens on this TCP port.
const PORT: u16 = 5432;

/// Crash recovery of a small database takes seconds; a server that is silent for longer is stuck.
const START_LIMIT: Duration = Duration::from_secs(120);
/// A fast shutdown waits for one checkpoint.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// PostgreSQL announces its state in a file only, so somebody has to look (`pg_ctl -w` does the same).
const STATE_POLL: Duration = Duration::from_millis(20);
/// Backends whose postmaster was killed notice it and go within moments.
const ORPHANS_LIMIT: Duration = Duration::from_secs(10);
/// How often a server that is not our child is looked at.
const ADOPTED_POLL: Duration = Duration::from_millis(100);
/// Between attempts to bring a server back that died under the hub.
const RESTART_DELAY: Duration = Duration::from_secs(1);
/// A log longer than this at start is set aside as `postgres.log.1`.
const MAX_LOG_BYTES: u64 = 8 << 20;

/// Written to `postgresql.conf` once, when the cluster is made; the operator may edit them later.
///
/// Durability stays as PostgreSQL ships it. The rest fits a database of some megabytes that one
/// program uses; statements and their parameters stay out of the log.
const SETTINGS: &str = "
# connect-hub: a small private database.
max_connections = 40
shared_buffers = 32MB
max_wal_size = 256MB
wal_level = minimal
max_wal_senders = 0
huge_pages = off
jit = off
max_parallel_workers_per_gather = 0
max_worker_processes = 2
max_logical_replication_workers = 0
autovacuum_max_workers = 1
log_checkpoints = off
log_min_error_statement = panic
log_parameter_max_length = 0
log_parameter_max_length_on_error = 0
";

/// Why the private cluster does not run.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// Another hub holds the data directory.
    #[error("another connect-hub (process {pid}) runs in `{}`", dir.display())]
    Locked {
        /// The data directory.
        dir: PathBuf,
        /// What the holder wrote into the lock file.
        pid: String,
    },
    /// No server binaries, or none of the wanted version.
    #[error("no PostgreSQL server binaries ({wanted}) found")]
    NoBinaries {
        /// The version that is wanted.
        wanted: String,
    },
    /// `CONNECT_HUB_PG_BIN` names a directory without `postgres` and `initdb`.
    #[error("`{}` has no `postgres` and `initdb` that can be run", dir.display())]
    BadBinDir {
        /// The directory that was named.
        dir: PathBuf,
    },
    /// The user of the PostgreSQL processes cannot come to the data directory, or to the binaries.
    #[error("user `{user}`, as which PostgreSQL runs, cannot enter `{}`", dir.display())]
    Untraversable {
        /// The user that PostgreSQL's processes run as.
        user: String,
        /// The topmost directory that shuts them out.
        dir: PathBuf,
    },
    /// Neither `postgres` nor `nobody` is in the password database.
    #[error("PostgreSQL refuses to run as root, and there is no user `postgres` or `nobody`")]
    NoUser,
    /// Something else sits where the socket directory belongs.
    #[error("`{}` exists and is not a private directory of user `{user}`", dir.display())]
    ForeignSocketDir {
        /// The socket directory.
        dir: PathBuf,
        /// Whose it should be.
        user: String,
    },
    /// A PostgreSQL program said no.
    #[error("{program} said: {message}")]
    Program {
        /// Which one.
        program: &'static str,
        /// The end of what it printed.
        message: String,
    },
    /// The server did not come up.
    #[error("PostgreSQL did not start; the end of `{}`: {message}", log.display())]
    NotStarted {
        /// The server's log file.
        log: PathBuf,
        /// Its last lines.
        message: String,
    },
    /// The server runs and a query failed.
    #[error("private database")]
    Database(#[from] sqlx::Error),
    /// A file operation failed.
    #[error("`{}`", path.display())]
    Io {
        /// On which path.
        path: PathBuf,
        /// How.
        source: io::Error,
    },
}

impl ClusterError {
    /// What a person can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Locked { .. } => Some("stop the other one, or give this one its own --data-dir".to_owned()),
            Self::NoBinaries { .. } => Some(
                "install them (Debian, Ubuntu: `apt install postgresql`; Fedora: `dnf install postgresql-server`; \
                 Alpine: `apk add postgresql`), name their directory in CONNECT_HUB_PG_BIN, or use --database-url"
                    .to_owned(),
            ),
            Self::BadBinDir { .. } => Some("set CONNECT_HUB_PG_BIN to the directory of the server binaries".to_owned()),
            Self::Untraversable { dir, .. } => {
                Some(format!("`chmod o+x {}`, or choose another place", dir.display()))
            }
            Self::NoUser => Some("run connect-hub as an ordinary user".to_owned()),
            Self::ForeignSocketDir { dir, .. } => Some(format!("remove `{}`", dir.display())),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Some("run connect-hub as the user that owns the directory, or choose another --data-dir".to_owned())
            }
            Self::Program { .. } | Self::NotStarted { .. } | Self::Database(_) | Self::Io { .. } => None,
        }
    }

    /// Whether the call was wrong, rather than the world.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Untraversable { .. } | Self::BadBinDir { .. })
    }
}

/// Attaches the path to an IO error.
fn at(path: &Path) -> impl FnOnce(io::Error) -> ClusterError + '_ {
    move |source| ClusterError::Io { path: path.to_owned(), source }
}

/// The directory that one hub owns, locked.
///
/// Dropping it frees the lock.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    /// The lock lives as long as this file is open; children do not inherit it.
    _lock: File,
}

impl DataDir {
    /// Creates the directory if need be and locks it.
    ///
    /// # Errors
    /// [`ClusterError::Locked`] while another hub runs there; [`ClusterError::Io`].
    pub fn lock(path: &Path) -> Result<Self, ClusterError> {
        // Root's directory must let the PostgreSQL user through; what is in it has modes of its own.
        let mode = if Uid::effective().is_root() { 0o711 } else { 0o700 };
        fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(at(path))?;
        let path = path.canonicalize().map_err(at(path))?;
        let lock_path = path.join("hub.lock");
        let mut lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(&lock_path)
            .map_err(at(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                lock.read_to_string(&mut pid).map_err(at(&lock_path))?;
                return Err(ClusterError::Locked { dir: path, pid: pid.trim().to_owned() });
            }
            Err(TryLockError::Error(source)) => return Err(at(&lock_path)(source)),
        }
        lock.set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .map_err(at(&lock_path))?;
        Ok(Self { path, _lock: lock })
    }

    /// Where it is: absolute, without symbolic links.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// How to reach the cluster of a hub that runs in `data_dir` as `role`; nothing is started.
///
/// # Errors
/// [`ClusterError::NoUser`], [`ClusterError::Io`].
pub fn connect_options(data_dir: &Path, role: &str) -> Result<PgConnectOptions, ClusterError> {
    let data_dir = data_dir.canonicalize().map_err(at(data_dir))?;
    Ok(Layout::of(&data_dir, RunAs::find()?).connect_options("connect", role))
}

/// The user that PostgreSQL's processes run as.
#[derive(Debug, Clone)]
struct RunAs {
    name: String,
    uid: Uid,
    gid: Gid,
    /// Whether this differs from our own user: only ever so when we are root.
    switch: bool,
}

impl RunAs {
    fn find() -> Result<Self, ClusterError> {
        let uid = Uid::effective();
        if !uid.is_root() {
            let name = match User::from_uid(uid) {
                Ok(Some(user)) => user.name,
                Ok(None) | Err(_) => uid.to_string(),
            };
            return Ok(Self { name, uid, gid: Gid::effective(), switch: false });
        }
        ["postgres", "nobody"]
            .into_iter()
            .find_map(|name| User::from_name(name).ok().flatten())
            .map(|user| Self { name: user.name, uid: user.uid, gid: user.gid, switch: true })
            .ok_or(ClusterError::NoUser)
    }

    /// A command that runs as this user, in a process group of its own, untouched by our `PG…` variables.
    fn command(&self, program: impl AsRef<OsStr>, cwd: &Path) -> Command {
        let mut command = Command::new(program);
        for (name, _) in env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"PG") {
                command.env_remove(name);
            }
        }
        command.env("LC_ALL", "C").current_dir(cwd).stdin(Stdio::null()).process_group(0);
        if self.switch {
            command.uid(self.uid.as_raw()).gid(self.gid.as_raw());
        }
        command
    }
}

/// The server binaries of one installation.
#[derive(Debug, Clone)]
struct Binaries {
    dir: PathBuf,
    postgres: PathBuf,
    initdb: PathBuf,
    major: u32,
}

impl Binaries {
    /// Finds the binaries of version `wanted`, or the first in `PATH`, or the newest.
    async fn find(wanted: Option<u32>) -> Result<Self, ClusterError> {
        let fits = |found: &Self| match wanted {
            Some(major) => found.major == major,
            None => found.major >= OLDEST_POSTGRES,
        };
        let wanted = || match wanted {
            Some(major) => format!("version {major}, which made the database"),
            None => format!("version {OLDEST_POSTGRES} or later"),
        };
        if let Some(dir) = env::var_os("CONNECT_HUB_PG_BIN").map(PathBuf::from) {
            let found = Self::in_dir(&dir).await.ok_or(ClusterError::BadBinDir { dir })?;
            return if fits(&found) {
                Ok(found)
            } else {
                Err(ClusterError::NoBinaries { wanted: wanted() })
            };
        }
        for dir in env::split_paths(&env::var_os("PATH").unwrap_or_default()) {
            if let Some(found) = Self::in_dir(&dir).await
                && fits(&found)
            {
                return Ok(found);
            }
        }
        let mut newest: Option<Self> = None;
        for dir in BIN_PLACES.iter().flat_map(|pattern| expand(pattern)) {
            if let Some(found) = Self::in_dir(&dir).await
                && fits(&found)
                && newest.as_ref().is_none_or(|best| best.major < found.major)
            {
                newest = Some(found);
            }
        }
        newest.ok_or_else(|| ClusterError::NoBinaries { wanted: wanted() })
    }

    async fn in_dir(dir: &Path) -> Option<Self> {
        let (postgres, initdb) = (dir.join("postgres"), dir.join("initdb"));
        if !postgres.is_file() || !initdb.is_file() {
            return None;
        }
        let output =
            Command::new(&postgres).arg("--version").stdin(Stdio::null()).output().await.ok()?;
        let major = parse_version(&String::from_utf8_lossy(&output.stdout))?;
        Some(Self { dir: dir.to_owned(), postgres, initdb, major })
    }
}

/// The major version in `postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)`, `17beta1` and the like.
fn parse_version(text: &str) -> Option<u32> {
    let version = text.split_once("(PostgreSQL)")?.1.trim_start();
    let digits = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
    version.get(..digits)?.parse().ok()
}

/// Finds one of PostgreSQL's client programs: of version `major`, or the newest that is later.
///
/// They stand beside the server's in most installations.
pub async fn client_program(name: &str, major: u32) -> Option<PathBuf> {
    let named = env::var_os("CONNECT_HUB_PG_BIN").map(PathBuf::from);
    let in_path = env::var_os("PATH").unwrap_or_default();
    let places = BIN_PLACES.iter().flat_map(|pattern| expand(pattern));
    let mut best: Option<(u32, PathBuf)> = None;
    for dir in named.into_iter().chain(env::split_paths(&in_path)).chain(places) {
        let program = dir.join(name);
        if !program.is_file() {
            continue;
        }
        let asked = Command::new(&program).arg("--version").stdin(Stdio::null()).output().await;
        let text = asked.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        match text.ok().and_then(|text| parse_version(&text)) {
            Some(found) if found == major => return Some(program),
            Some(found)
                if found > major && best.as_ref().is_none_or(|(newest, _)| *newest < found) =>
            {
                best = Some((found, program));
            }
            Some(_) | None => {}
        }
    }
    best.map(|(_, program)| program)
}

/// Whether a private cluster was made in this data directory.
#[must_use]
pub fn exists(data_dir: &Path) -> bool {
    data_dir.join("postgres/PG_VERSION").exists()
}

/// The directories that match a pattern of [`BIN_PLACES`].
fn expand(pattern: &str) -> Vec<PathBuf> {
    let Some((before, after)) = pattern.split_once('*') else {
        return vec![PathBuf::from(pattern)];
    };
    let (parent, prefix) = before.rsplit_once('/').unwrap_or(("", before));
    let Ok(entries) = fs::read_dir(parent) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(prefix.as_bytes()))
        .map(|entry| {
            let mut path = OsString::from(entry.path());
            path.push(after);
            PathBuf::from(path)
        })
        .collect()
}

/// Where the parts of a cluster are.
#[derive(Debug, Clone)]
struct Layout {
    data_dir: PathBuf,
    pgdata: PathBuf,
    socket_dir: PathBuf,
    log: PathBuf,
    run_as: RunAs,
}

impl Layout {
    fn of(data_dir: &Path, run_as: RunAs) -> Self {
        let mut socket_dir = data_dir.join("socket");
        if socket_dir.as_os_str().len() > MAX_SOCKET_DIR_BYTES {
            let digest = Sha256::digest(data_dir.as_os_str().as_encoded_bytes());
            socket_dir =
                Path::new("/tmp").join(format!("connect-hub-{}", hex::encode(&digest[..8])));
        }
        Self {
            data_dir: data_dir.to_owned(),
            pgdata: data_dir.join("postgres"),
            socket_dir,
            log: data_dir.join("postgres.log"),
            run_as,
        }
    }

    fn connect_options(&self, database: &str, role: &str) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .socket(&self.socket_dir)
            .port(PORT)
            .username(role)
            .database(database)
            .ssl_mode(PgSslMode::Disable)
            .application_name("connect-hub")
            .disable_statement_logging()
    }

    /// Lets the PostgreSQL user into the data directory. It is ours to open; those above it are not.
    fn open_data_dir(&self) -> Result<(), ClusterError> {
        let permissions = fs::metadata(&self.data_dir).map_err(at(&self.data_dir))?.permissions();
        if self.run_as.switch && permissions.mode() & 0o011 != 0o011 {
            let opened = fs::Permissions::from_mode(permissions.mode() | 0o011);
            fs::set_permissions(&self.data_dir, opened).map_err(at(&self.data_dir))?;
        }
        Ok(())
    }

    /// Makes sure that the PostgreSQL user can come to `dir`, or says what is in its way.
    async fn check_path(&self, dir: &Path) -> Result<(), ClusterError> {
        if !self.run_as.switch {
            return Ok(());
        }
        let dir = dir.canonicalize().map_err(at(dir))?;
        let mut above: Vec<&Path> = dir.ancestors().collect();
        above.reverse();
        for dir in above {
            // Asked of the kernel, as that user: access lists and mounts count as much as modes.
            let status = self
                .run_as
                .command("/bin/sh", Path::new("/"))
                .args(["-c", "cd -- \"$0\""])
                .arg(dir)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .await
                .map_err(at(Path::new("/bin/sh")))?;
            if !status.success() {
                return Err(ClusterError::Untraversable {
                    user: self.run_as.name.clone(),
                    dir: dir.to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Makes a directory that only the PostgreSQL user can enter.
    fn make_private(&self, dir: &Path) -> Result<(), ClusterError> {
        match fs::DirBuilder::new().mode(0o700).create(dir) {
            Ok(()) if self.run_as.switch => {
                chown(dir, Some(self.run_as.uid), Some(self.run_as.gid))
                    .map_err(|errno| at(dir)(errno.into()))
            }
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let found = fs::symlink_metadata(dir).map_err(at(dir))?;
                if found.is_dir()
                    && found.uid() == self.run_as.uid.as_raw()
                    && found.mode() & 0o077 == 0
                {
                    Ok(())
                } else {
                    Err(ClusterError::ForeignSocketDir {
                        dir: dir.to_owned(),
                        user: self.run_as.name.clone(),
                    })
                }
            }
            Err(error) => Err(at(dir)(error)),
        }
    }

    /// The major version that made the cluster; `None` when there is none yet.
    fn version(&self) -> Result<Option<u32>, ClusterError> {
        let path = self.pgdata.join("PG_VERSION");
        match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().map(Some).map_err(|_| {
                at(&path)(io::Error::new(io::ErrorKind::InvalidData, "no PostgreSQL version"))
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at(&path)(error)),
        }
    }

    /// Makes the cluster, in a directory that takes its place only when it is complete.
    async fn init(&self, binaries: &Binaries) -> Result<(), ClusterError> {
        let fresh = self.data_dir.join("postgres.new");
        match fs::remove_dir_all(&fresh) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(at(&fresh)(error)),
        }
        self.make_private(&fresh)?;
        let output = self
            .run_as
            .command(&binaries.initdb, &self.data_dir)
            .args([
                "--encoding=UTF8",
                "--locale=C",
                "--auth=trust",
                "--username=postgres",
                "--data-checksums",
            ])
            .arg("-D")
            .arg(&fresh)
            .output()
            .await
            .map_err(at(&binaries.initdb))?;
        if !output.status.success() {
            return Err(ClusterError::Program { program: "initdb", message: end_of(&output) });
        }
        let conf = fresh.join("postgresql.conf");
        OpenOptions::new()
            .append(true)
            .open(&conf)
            .and_then(|mut file| file.write_all(SETTINGS.as_bytes()).and_then(|()| file.sync_all()))
            .map_err(at(&conf))?;
        fs::rename(&fresh, &self.pgdata).map_err(at(&self.pgdata))
    }

    /// What `postmaster.pid` says, when it names this cluster.
    fn pid_file(&self) -> Option<PidFile> {
        let text = fs::read_to_string(self.pgdata.join("postmaster.pid")).ok()?;
        let mut lines = text.lines();
        let pid = Pid::from_raw(lines.next()?.trim().parse().ok()?);
        let names_us = Path::new(lines.next()?) == self.pgdata;
        // Lines 3 to 7: start time, port, socket directory, address, shared memory.
        let ready = lines.nth(5).is_some_and(|status| status.trim() == "ready");
        (names_us && pid.as_raw() > 1).then_some(PidFile { pid, ready })
    }

    /// Removes lock files that no server stands behind.
    ///
    /// PostgreSQL refuses to start while any process of the id in them exists, which after a reboot or in
    /// a restarted container can be anything, and after a kill can be a zombie. Removing them is safe only when no server process is left, orphaned backends included: all of them work in
    /// PGDATA, and we hold `hub.lock`, so nobody is starting one.
    async fn clear_lock_files(&self) -> Result<(), ClusterError> {
        let files = [
            self.pgdata.join("postmaster.pid"),
            self.socket_dir.join(format!(".s.PGSQL.{PORT}.lock")),
        ];
        let deadline = Instant::now() + ORPHANS_LIMIT;
        for path in files {
            while path.exists() {
                match self.has_processes() {
                    Ok(false) => {
                        tracing::info!(path = %path.display(), "removing what a dead server left");
                        fs::remove_file(&path).map_err(at(&path))?;
                    }
                    Ok(true) if Instant::now() < deadline => sleep(STATE_POLL).await,
                    // PostgreSQL will say what is in its way.
                    Ok(true) | Err(_) => return Ok(()),
                }
            }
        }
        Ok(())
    }

    /// Whether any process works in PGDATA; an error where the system has no `/proc`.
    fn has_processes(&self) -> io::Result<bool> {
        let processes = fs::read_dir("/proc")?;
        if !Path::new("/proc/self/cwd").exists() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(processes
            .flatten()
            .filter_map(|process| fs::read_link(process.path().join("cwd")).ok())
            .any(|cwd| cwd == self.pgdata))
    }

    /// The server that a hub before us left running.
    async fn adopt(&self) -> Option<Postmaster> {
        let PidFile { pid, ready: true } = self.pid_file()? else {
            return None;
        };
        kill(pid, None).ok()?;
        let ask = async {
            let mut connection =
                PgConnection::connect_with(&self.connect_options("postgres", "postgres")).await?;
            let row: (String,) = sqlx::query_as("SELECT current_setting('data_directory')")
                .fetch_one(&mut connection)
                .await?;
            connection.close().await?;
            Ok::<_, sqlx::Error>(row.0)
        };
        let answer = timeout(Duration::from_secs(5), ask).await.ok()?.ok()?;
        (Path::new(&answer) == self.pgdata).then_some(Postmaster { pid, child: None })
    }

    /// Starts the server and waits until it takes connections.
    async fn launch(&self, binaries: &Binaries) -> Result<Postmaster, ClusterError> {
        self.clear_lock_files().await?;
        if fs::metadata(&self.log).is_ok_and(|log| log.len() > MAX_LOG_BYTES) {
            fs::rename(&self.log, self.log.with_extension("log.1")).map_err(at(&self.log))?;
        }
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&self.log)
            .map_err(at(&self.log))?;
        let said_before = log.metadata().map_err(at(&self.log))?.len();
        let mut child = self
            .run_as
            .command(&binaries.postgres, &self.data_dir)
            .arg("-D")
            .arg(&self.pgdata)
            .args(["-c", "listen_addresses="])
            .args(["-c", "unix_socket_permissions=0700"])
            .arg("-p")
            .arg(PORT.to_string())
            .arg("-k")
            .arg(&self.socket_dir)
            .stdout(log.try_clone().map_err(at(&self.log))?)
            .stderr(log)
            .spawn()
            .map_err(at(&binaries.postgres))?;
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let exited = child.try_wait().map_err(at(&binaries.postgres))?.is_some();
            match pid {
                Some(pid) if !exited && Instant::now() < deadline => {
                    if self.pid_file().is_some_and(|file| file.pid == pid && file.ready) {
                        return Ok(Postmaster { pid, child: Some(child) });
                    }
                }
                Some(_) | None => {
                    if let Some(pid) = pid
                        && !exited
                    {
                        Postmaster { pid, child: Some(child) }.stop(&self.pgdata).await;
                    }
                    return Err(ClusterError::NotStarted {
                        log: self.log.clone(),
                        message: end_of_log(&self.log, said_before),
                    });
                }
            }
            sleep(STATE_POLL).await;
        }
    }

    /// Makes the database of the hub if it is not there.
    async fn create_database(&self) -> Result<(), ClusterError> {
        let mut connection =
            PgConnection::connect_with(&self.connect_options("postgres", "postgres")).await?;
        let there: (bool,) =
            sqlx::query_as("SELECT EXISTS (SELECT FROM pg_database WHERE datname = 'connect')")
                .fetch_one(&mut connection)
                .await?;
        if !there.0 {
            sqlx::query("CREATE DATABASE connect").execute(&mut connection).await?;
        }
        connection.close().await?;
        Ok(())
    }
}

/// The first and the last line of `postmaster.pid`.
#[derive(Debug, Clone, Copy)]
struct PidFile {
    pid: Pid,
    ready: bool,
}

/// A running server.
#[derive(Debug)]
struct Postmaster {
    pid: Pid,
    /// `None` when a hub before us started it.
    child: Option<Child>,
}

impl Postmaster {
    /// Returns when the process is gone.
    async fn exited(&mut self) {
        match &mut self.child {
            // An error means that there is nothing to wait for.
            Some(child) => drop(child.wait().await),
            None => {
                while is_running(self.pid) {
                    sleep(ADOPTED_POLL).await;
                }
            }
        }
    }

    /// Fast shutdown; an immediate one when that takes too long.
    async fn stop(mut self, pgdata: &Path) {
        for signal in [Signal::SIGINT, Signal::SIGQUIT] {
            if kill(self.pid, signal).is_err() {
                return;
            }
            if timeout(STOP_LIMIT, self.exited()).await.is_ok() {
                return;
            }
            tracing::warn!(pid = %self.pid, dir = %pgdata.display(), "PostgreSQL does not stop");
        }
    }
}

/// Whether a process that is not our child still runs. A zombie that nobody has reaped does not.
fn is_running(pid: Pid) -> bool {
    match fs::read_link(format!("/proc/{pid}/cwd")) {
        Ok(_) => true,
        // A zombie has no working directory; where there is no /proc this says nothing.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound && Path::new("/proc/self").exists() =>
        {
            false
        }
        Err(_) => kill(pid, None) != Err(Errno::ESRCH),
    }
}

/// The running private cluster: started, watched and stopped with the hub.
///
/// Dropped without [`Cluster::stop`], the server keeps running; the next hub adopts it.
#[derive(Debug)]
pub struct Cluster {
    layout: Layout,
    stop: oneshot::Sender<()>,
    supervisor: JoinHandle<()>,
    _data_dir: DataDir,
}

impl Cluster {
    /// Makes the cluster if there is none, then adopts a running server or starts one.
    ///
    /// A server that dies is started again until [`Cluster::stop`].
    ///
    /// # Errors
    /// Every [`ClusterError`] but [`ClusterError::Locked`].
    pub async fn start(data_dir: DataDir) -> Result<Self, ClusterError> {
        let layout = Layout::of(data_dir.path(), RunAs::find()?);
        layout.open_data_dir()?;
        layout.check_path(&layout.data_dir).await?;
        layout.make_private(&layout.socket_dir)?;
        let version = layout.version()?;
        let binaries = Binaries::find(version).await?;
        layout.check_path(&binaries.dir).await?;
        if version.is_none() {
            tracing::info!(version = binaries.major, dir = %layout.pgdata.display(), "creating the private PostgreSQL cluster");
            layout.init(&binaries).await?;
        }
        let postmaster = match layout.adopt().await {
            Some(adopted) => {
                tracing::info!(pid = %adopted.pid, "adopted the PostgreSQL that an earlier hub left running");
                adopted
            }
            None => layout.launch(&binaries).await?,
        };
        layout.create_database().await?;
        let (stop, stopped) = oneshot::channel();
        let supervisor = tokio::spawn(supervise(layout.clone(), binaries, postmaster, stopped));
        Ok(Self { layout, stop, supervisor, _data_dir: data_dir })
    }

    /// How to connect to the hub's database as `role`.
    #[must_use]
    pub fn connect_options(&self, role: &str) -> PgConnectOptions {
        self.layout.connect_options("connect", role)
    }

    /// Stops the server and frees the data directory.
    pub async fn stop(self) {
        // A supervisor that is gone has no server to stop.
        let _ = self.stop.send(());
        if let Err(error) = self.supervisor.await {
            tracing::error!(%error, "the task that watches PostgreSQL is gone");
        }
    }
}

/// Keeps the server running until told to stop it, or left alone by a dropped [`Cluster`].
async fn supervise(
    layout: Layout,
    binaries: Binaries,
    first: Postmaster,
    mut stop: oneshot::Receiver<()>,
) {
    let mut postmaster = first;
    loop {
        tokio::select! {
            asked = &mut stop => {
                if asked.is_ok() {
                    postmaster.stop(&layout.pgdata).await;
                }
                return;
            }
            () = postmaster.exited() => {}
        }
        tracing::error!("PostgreSQL ended under the hub; starting it again");
        postmaster = loop {
            match layout.launch(&binaries).await {
                Ok(started) => break started,
                Err(error) => tracing::error!(%error, "PostgreSQL does not come back"),
            }
            tokio::select! {
                _ = &mut stop => return,
                () = sleep(RESTART_DELAY) => {}
            }
        };
        tracing::warn!("PostgreSQL is back");
    }
}

/// The last lines that a program printed, in one line.
fn end_of(output: &Output) -> String {
    last_lines(&output.stderr)
}

/// The last lines of a log file after `from`, in one line.
fn end_of_log(path: &Path, from: u64) -> String {
    let mut text = Vec::new();
    let read = File::open(path).and_then(|mut file| {
        file.seek(io::SeekFrom::Start(from))?;
        file.read_to_end(&mut text)
    });
    match read {
        Ok(_) => last_lines(&text),
        Err(error) => error.to_string(),
    }
}

/// The last lines of what a program printed, in one line.
pub(crate) fn last_lines(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(4)..].join(" / ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_version(text: &str, expected: Option<u32>) {
        assert_eq!(parse_version(text), expected);
    }

    #[test]
    fn versions_are_read_as_distributions_print_them() {
        check_version("postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)\n", Some(15));
        check_version("postgres (PostgreSQL) 17beta1\n", Some(17));
        check_version("postgres (PostgreSQL) 9.6.24\n", Some(9));
        check_version("postgres (PostgreSQL)\n", None);
        check_version("busybox\n", None);
    }

    #[test]
    fn a_long_data_directory_gets_a_short_socket_directory() {
        let run_as = RunAs::find().unwrap();
        let short = Layout::of(Path::new("/var/lib/connect-hub"), run_as.clone());
        assert_eq!(short.socket_dir, Path::new("/var/lib/connect-hub/socket"));
        let deep = PathBuf::from(format!("/{}", "d".repeat(120)));
        let long = Layout::of(&deep, run_as.clone());
        assert!(long.socket_dir.as_os_str().len() <= MAX_SOCKET_DIR_BYTES);
        assert_ne!(long.socket_dir, Layout::of(&deep.join("e"), run_as).socket_dir);
    }
}
