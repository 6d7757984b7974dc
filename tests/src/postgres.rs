//! A throwaway PostgreSQL, as the service that somebody wants to reach.

use std::{
    env, fs,
    net::SocketAddr,
    os::unix::{fs::chown, process::CommandExt},
    path::PathBuf,
    process::Command,
};

use nix::{
    sys::signal::Signal,
    unistd::{User, geteuid},
};

use crate::{
    PATIENCE,
    process::{Process, new_dir},
    services::closed_port,
};

/// A PostgreSQL server that runs until it is dropped.
#[derive(Debug)]
pub struct Postgres {
    address: SocketAddr,
    process: Process,
}

/// The directory of the server's programs, where the hub would find it.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn bin_dir() -> PathBuf {
    let named = env::var_os("CONNECT_HUB_PG_BIN").map(PathBuf::from);
    let in_path = env::var_os("PATH").unwrap_or_default();
    let mut installed: Vec<_> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|version| version.path().join("bin"))
        .collect();
    installed.sort();
    named
        .into_iter()
        .chain(env::split_paths(&in_path))
        .chain(installed.into_iter().rev())
        .find(|dir| dir.join("initdb").is_file() && dir.join("postgres").is_file())
        .expect("PostgreSQL's server programs: run `make test`")
}

/// The program `psql`: beside the server's programs, else in `PATH`.
///
/// # Panics
/// When there are no server programs.
#[must_use]
pub fn psql() -> PathBuf {
    let beside = bin_dir().join("psql");
    if beside.is_file() { beside } else { "psql".into() }
}

impl Postgres {
    /// Makes a cluster and starts its server on a port of 127.0.0.1.
    #[must_use]
    pub fn start() -> Self {
        let data_dir = new_dir("postgres");
        // PostgreSQL refuses to run as root.
        let user = geteuid().is_root().then(|| {
            ["postgres", "nobody"]
                .iter()
                .find_map(|name| User::from_name(name).ok().flatten())
                .expect("an ordinary user")
        });
        let program = |name: &str| {
            let mut command = Command::new(bin_dir().join(name));
            command.current_dir("/").env_remove("PGDATA");
            if let Some(user) = &user {
                command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
            }
            command
        };
        if let Some(user) = &user {
            chown(&data_dir, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
                .expect("we are root");
        }
        let mut initdb = program("initdb");
        initdb.args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C"]);
        initdb.args(["--no-sync", "-D"]).arg(&data_dir);
        let made = Process::spawn("initdb", &mut initdb).outcome();
        assert_eq!(made.code, Some(0), "{}", made.stderr);

        let address = SocketAddr::from(([127, 0, 0, 1], closed_port().port()));
        let mut server = program("postgres");
        server.arg("-D").arg(&data_dir).args(["-h", "127.0.0.1", "-k", "", "-F", "-p"]);
        server.arg(address.port().to_string());
        let process = Process::spawn("postgres", &mut server);
        process.stderr_line("ready to accept connections");
        Self { address, process }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // At once, but with its shared memory given back.
        self.process.signal(Signal::SIGQUIT);
        self.process.wait(PATIENCE);
    }
}
