//! An agent's home, the `connect` commands run in it, and workspaces of such homes.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use crate::{
    hub::Hub,
    process::{Outcome, Process, new_dir, program},
};

/// One agent's home.
#[derive(Debug)]
pub struct Home {
    dir: PathBuf,
}

impl Home {
    /// An empty home.
    #[must_use]
    pub fn new() -> Self {
        Self { dir: new_dir("agent").join("home") }
    }

    /// The home in this directory.
    #[must_use]
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `connect` with these arguments, in this home and with nothing else of this environment.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program("connect"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("CONNECT_") {
                command.env_remove(name);
            }
        }
        command.env("CONNECT_HOME", &self.dir).env_remove("XDG_RUNTIME_DIR");
        // What is said is as wide as where there is no terminal.
        command.env_remove("COLUMNS");
        // Tests count the connections to their services, so nobody looks at those in between.
        command.env("CONNECT_HEALTH_EVERY_MS", "3600000");
        command.current_dir("/").args(args);
        command
    }

    /// Runs `connect` to its end.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> Outcome {
        Process::spawn("connect", &mut self.command(args)).outcome()
    }

    /// Runs `connect`, which must succeed; returns its stdout without the last line break.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        let Outcome { code, stdout, stderr } = self.run(args);
        assert_eq!(code, Some(0), "connect {args:?}:\n{stdout}\n{stderr}");
        stdout.trim_end().to_owned()
    }

    /// Runs `connect --json`, which must succeed.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let text = self.ok(&[&["--json"], args].concat());
        serde_json::from_str(&text).expect("JSON")
    }

    /// Runs `connect`, which must end with this code and a message that contains `part`.
    ///
    /// # Panics
    /// When it ends in another way, or prints a result.
    #[track_caller]
    pub fn fails(&self, args: &[&str], expected: i32, part: &str) {
        let Outcome { code, stdout, stderr } = self.run(args);
        assert_eq!(code, Some(expected), "connect {args:?}:\n{stdout}\n{stderr}");
        assert!(stderr.contains("error: "), "no message: {stderr}");
        assert!(stderr.contains(part), "`{part}` is not in: {stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
        assert_eq!(stdout, "", "a failure is no result");
    }

    /// Starts the agent in the foreground and waits until it is connected.
    #[track_caller]
    pub fn up(&self) -> Process {
        self.up_with(&[])
    }

    /// As [`Home::up`], with options.
    #[track_caller]
    pub fn up_with(&self, options: &[&str]) -> Process {
        self.up_logging("debug", options)
    }

    /// As [`Home::up`], with options and another log than tests want: `info` or more.
    #[track_caller]
    pub fn up_logging(&self, log: &str, options: &[&str]) -> Process {
        let process = Process::spawn(
            "connect up",
            self.command(&[&["up"], options].concat()).env("CONNECT_LOG", log),
        );
        process.stderr_line(" connected hub=");
        process
    }

    /// Reaches a service; returns the local address.
    ///
    /// # Panics
    /// When that fails.
    #[track_caller]
    pub fn reach(&self, name: &str) -> SocketAddr {
        self.ok(&["reach", name]).parse().expect("stdout is the local address")
    }

    /// Everything in the home, for "nothing was changed".
    #[must_use]
    pub fn snapshot(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files = Vec::new();
        let mut dirs = vec![self.dir.clone()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).expect("our own directory").flatten() {
                let path = entry.path();
                if path.is_dir() {
                    dirs.push(path);
                } else if path.is_file() {
                    files.push((path.clone(), fs::read(path).expect("our own file")));
                }
            }
        }
        files.sort();
        files
    }
}

impl Default for Home {
    fn default() -> Self {
        Self::new()
    }
}

/// A workspace and the home that founded it.
#[derive(Debug)]
pub struct Workspace {
    /// The first agent, which can invite.
    pub founder: Home,
    /// The workspace's id.
    pub id: String,
}

impl Workspace {
    /// Founds a workspace.
    #[must_use]
    pub fn found(hub: &Hub) -> Self {
        Self::found_at(hub.url())
    }

    /// Founds a workspace at the hub of this URL.
    #[must_use]
    pub fn found_at(url: &str) -> Self {
        let founder = Home::new();
        let founded = founder.json(&["init", "--hub", url, "--label", "founder"]);
        let id = founded["workspace_id"].as_str().expect("an id").to_owned();
        Self { founder, id }
    }

    /// Enrols one more agent.
    #[must_use]
    pub fn join(&self, label: &str) -> Home {
        let code = self.founder.ok(&["invite"]);
        let home = Home::new();
        home.ok(&["join", &code, "--label", label]);
        home
    }
}

/// An exposer and a reacher that are up.
#[derive(Debug)]
pub struct Pair {
    /// Their workspace; its founder is the exposer.
    pub workspace: Workspace,
    /// The other one.
    pub reacher: Home,
    /// The exposer's process.
    pub exposer_agent: Process,
    /// The reacher's process.
    pub reacher_agent: Process,
}

impl Pair {
    /// Enrols and starts two agents.
    #[must_use]
    pub fn start(hub: &Hub) -> Self {
        Self::start_with(hub, &[])
    }

    /// As [`Pair::start`], with options for `connect up`.
    #[must_use]
    pub fn start_with(hub: &Hub, options: &[&str]) -> Self {
        Self::start_logging(hub, "debug", options)
    }

    /// As [`Pair::start_with`], with another log than tests want: `info` or more.
    #[must_use]
    pub fn start_logging(hub: &Hub, log: &str, options: &[&str]) -> Self {
        let workspace = Workspace::found(hub);
        let reacher = workspace.join("reacher");
        let exposer_agent = workspace.founder.up_logging(log, options);
        let reacher_agent = reacher.up_logging(log, options);
        Self { workspace, reacher, exposer_agent, reacher_agent }
    }

    /// The exposer's home.
    #[must_use]
    pub fn exposer(&self) -> &Home {
        &self.workspace.founder
    }

    /// Exposes a target under a name and reaches it; returns the local address.
    #[track_caller]
    pub fn carry(&self, target: SocketAddr, name: &str) -> SocketAddr {
        self.exposer().ok(&["expose", &target.to_string(), "--name", name]);
        self.reacher.reach(name)
    }
}
