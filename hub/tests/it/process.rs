//! A hub as a child process with a data directory of its own.

use std::{
    net::SocketAddr,
    path::Path,
    process::{ExitStatus, Output, Stdio},
    sync::{Arc, Mutex},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStderr, ChildStdout, Command},
    task::JoinHandle,
};

/// The program under test.
pub(crate) fn hub_command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_connect-hub"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CONNECT_HUB_") && name != "CONNECT_HUB_PG_BIN" {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A running hub; stopped, with its database, when dropped.
pub(crate) struct HubProcess {
    child: Child,
    pub(crate) agents: SocketAddr,
    pub(crate) admin: SocketAddr,
    /// The line that the hub printed.
    pub(crate) init_line: String,
    log: Arc<Mutex<String>>,
    log_reader: JoinHandle<()>,
}

impl HubProcess {
    /// Starts a hub on loopback that logs everything.
    pub(crate) async fn start(data_dir: &Path) -> Self {
        Self::start_with(data_dir, &["--listen", "127.0.0.1:0"], |_| ()).await
    }

    pub(crate) async fn start_with(
        data_dir: &Path,
        args: &[&str],
        prepare: impl FnOnce(&mut Command),
    ) -> Self {
        let mut command = hub_command();
        command
            .env("CONNECT_HUB_LOG", "trace")
            .args(["serve", "--admin-listen", "127.0.0.1:0", "--data-dir"])
            .arg(data_dir)
            .args(args);
        prepare(&mut command);
        let mut child = command.spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap()).lines();
        let stderr = BufReader::new(child.stderr.take().unwrap()).lines();
        let log = Arc::new(Mutex::new(String::new()));
        let log_reader = tokio::spawn(collect(stderr, Arc::clone(&log)));
        let init_line = first_line(&mut stdout)
            .await
            .unwrap_or_else(|| panic!("no hub: {}", log.lock().unwrap()));
        // The log line was written before the one on stdout, but another task reads it.
        let ready = loop {
            let found = log
                .lock()
                .unwrap()
                .lines()
                .find(|line| line.contains(" ready ") || line.contains("\"ready\""))
                .map(str::to_owned);
            match found {
                Some(line) => break line,
                None => tokio::task::yield_now().await,
            }
        };
        // As text or as JSON.
        let address = |name: &str| {
            let (_, rest) = ready.split_once(name).unwrap();
            let rest = rest.trim_start_matches(['=', '"', ':']);
            rest.split(['"', ' ']).next().unwrap().parse().unwrap()
        };
        let (agents, admin) = (address("agents"), address("admin"));
        Self { child, agents, admin, init_line, log, log_reader }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id().unwrap()).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
    }

    /// Waits until the log has a line with this part.
    pub(crate) async fn logged(&self, part: &str) {
        while !self.log.lock().unwrap().contains(part) {
            tokio::task::yield_now().await;
        }
    }

    /// Waits for the end; gives the status and the whole log.
    pub(crate) async fn wait(mut self) -> (ExitStatus, String) {
        let status = self.child.wait().await.unwrap();
        (&mut self.log_reader).await.unwrap();
        let log = self.log.lock().unwrap().clone();
        (status, log)
    }

    /// Stops the hub as an operator does; gives the log.
    pub(crate) async fn stop(self) -> String {
        self.signal(Signal::SIGTERM);
        let (status, log) = self.wait().await;
        assert!(status.success(), "{log}");
        log
    }
}

impl Drop for HubProcess {
    fn drop(&mut self) {
        if self.child.id().is_some() {
            // A test failed: take the database down too, and wait for it.
            self.signal(Signal::SIGTERM);
            while matches!(self.child.try_wait(), Ok(None)) {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    }
}

async fn first_line(stdout: &mut Lines<BufReader<ChildStdout>>) -> Option<String> {
    stdout.next_line().await.unwrap()
}

async fn collect(mut lines: Lines<BufReader<ChildStderr>>, log: Arc<Mutex<String>>) {
    while let Ok(Some(line)) = lines.next_line().await {
        let mut log = log.lock().unwrap();
        log.push_str(&line);
        log.push('\n');
    }
}

/// Runs the program to its end.
pub(crate) async fn run(args: &[&str]) -> Output {
    hub_command().args(args).output().await.unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
