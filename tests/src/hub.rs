//! A real hub: a `connect-hub serve` process with its private PostgreSQL.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
    time::Duration,
};

use nix::sys::signal::Signal;

use crate::{
    eventually,
    process::{Process, new_dir, program},
};

/// A hub that runs.
#[derive(Debug)]
pub struct Hub {
    process: Option<Process>,
    data_dir: PathBuf,
    url: String,
    listen: String,
    options: Vec<String>,
}

impl Hub {
    /// The hub of all tests that neither harm nor inspect it.
    #[must_use]
    pub fn shared() -> &'static Self {
        static SHARED: LazyLock<Hub> = LazyLock::new(|| Hub::start(&[]));
        &SHARED
    }

    /// Starts a hub of the test's own on a port that the kernel chooses.
    #[must_use]
    pub fn start(options: &[&str]) -> Self {
        Self::start_on("127.0.0.1:0", options)
    }

    /// Starts a hub that listens on `listen`.
    #[must_use]
    pub fn start_on(listen: &str, options: &[&str]) -> Self {
        let mut hub = Self {
            process: None,
            data_dir: new_dir("hub"),
            url: String::new(),
            listen: listen.to_owned(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
        };
        hub.run();
        if listen == "127.0.0.1:0" {
            hub.listen = hub.address().to_string();
        }
        hub
    }

    fn run(&mut self) {
        let mut command = Self::command();
        command
            .args([
                "serve",
                "--listen",
                &self.listen,
                "--admin-listen",
                "127.0.0.1:0",
                "--data-dir",
            ])
            .arg(&self.data_dir)
            .args(&self.options);
        let process = Process::spawn("connect-hub", &mut command);
        self.url = process.stdout_line(|line| {
            line.strip_prefix("connect init --hub ")
                .map(|rest| rest.split(' ').next().unwrap_or(rest).to_owned())
        });
        self.process = Some(process);
    }

    /// `connect-hub`, logging everything, with nothing of this environment that could change it.
    #[must_use]
    pub fn command() -> Command {
        let mut command = Command::new(program("connect-hub"));
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            if name.starts_with("CONNECT_") && name != "CONNECT_HUB_PG_BIN" {
                command.env_remove(name);
            }
        }
        // Everything that anything below us would log, too.
        command.env("RUST_LOG", "trace").env("CONNECT_HUB_LOG", "trace,connect_hub=trace");
        command.current_dir("/");
        command
    }

    /// For `connect init --hub`, with the pin if it has one.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        let authority = self.url.split("://").nth(1).and_then(|rest| rest.split('#').next());
        authority.and_then(|authority| authority.parse().ok()).expect("an address in the URL")
    }

    /// Its directory.
    #[must_use]
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// What it logged.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::stderr).unwrap_or_default()
    }

    /// Lets it read its certificate again; waits until it logged `part` once more than before.
    #[track_caller]
    pub fn reload(&self, part: &str) {
        let process = self.process.as_ref().expect("it runs");
        let said = || process.stderr().matches(part).count();
        let before = said();
        process.signal(Signal::SIGHUP);
        eventually(part, || said() > before);
    }

    /// Its process.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.as_ref().expect("it runs").id()
    }

    /// Kills it as `kill -9` does; its database goes on.
    pub fn kill(&mut self) {
        self.process.take().expect("it runs").kill();
    }

    /// Starts it again, where it was.
    pub fn restart(&mut self) {
        self.run();
    }

    /// Stops it as an operator does.
    ///
    /// # Panics
    /// When it does not end, or ends with an error.
    pub fn stop(&mut self) {
        let process = self.process.take().expect("it runs");
        process.signal(Signal::SIGTERM);
        let outcome = process.outcome();
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take()
            && !process.has_ended()
        {
            process.signal(Signal::SIGTERM);
            process.wait(Duration::from_secs(15));
        }
    }
}
