//! The agent as a service of the system: systemd or launchd starts it, and starts it again.
//!
//! `connect down` must stop it for good, so an exit with 0 means that it was told to, and is no reason to
//! start it again; all other ends are, but for those that trying again does not mend.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::{
        ffi::OsStrExt,
        fs::MetadataExt,
        net::{SocketAddr, UnixDatagram},
    },
    path::{Path, PathBuf},
    process::Command,
};

#[cfg(target_os = "linux")]
use std::os::linux::net::SocketAddrExt;

use connect_agent::{Error, ErrorKind, Home, Result, local};
use connect_spec::hash::hash16;
use serde::{Serialize, Serializer};

use crate::{
    cli::{self, Encoding},
    commands,
    output::Output,
};

/// Variables that an agent needs as a service, too.
const CARRIED: [&str; 2] = ["CONNECT_ALLOW_INSECURE", "CONNECT_LOG"];

/// Exit codes after which starting again is no use: told to stop, usage, not enrolled, displaced by a copy,
/// damaged.
const FINAL: &str = "0 2 3 6 7";

/// Runs `connect daemon …`, but for the logs.
pub(crate) async fn run(home: &Home, command: cli::Daemon, output: Output) -> Result<()> {
    match command {
        cli::Daemon::Install(install) => run_install(home, &install, output).await,
        cli::Daemon::Uninstall => run_uninstall(home, output),
        cli::Daemon::Status => run_status(home, output),
        cli::Daemon::Logs(logs) => {
            crate::agent_log::show(home, logs.lines, logs.follow, output).await
        }
    }
}

/// Who starts programs on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Manager {
    SystemdUser,
    SystemdSystem,
    LaunchdUser,
    LaunchdSystem,
}

/// The service of one home.
#[derive(Debug, Serialize)]
pub(crate) struct Service {
    pub(crate) manager: Manager,
    pub(crate) name: String,
    #[serde(serialize_with = "as_text")]
    pub(crate) file: PathBuf,
}

/// A path as text, also where it is none.
fn as_text<S: Serializer>(path: &Path, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// What a definition says.
#[derive(Debug)]
struct Definition {
    program: PathBuf,
    home: PathBuf,
    /// For a service of the whole system: the home's owner.
    user: Option<String>,
    encoding: Encoding,
    environment: Vec<(String, OsString)>,
}

impl Manager {
    fn of(system: bool) -> Self {
        match (cfg!(target_os = "macos"), system) {
            (false, false) => Self::SystemdUser,
            (false, true) => Self::SystemdSystem,
            (true, false) => Self::LaunchdUser,
            (true, true) => Self::LaunchdSystem,
        }
    }

    fn is_systemd(self) -> bool {
        matches!(self, Self::SystemdUser | Self::SystemdSystem)
    }

    fn systemctl(self, args: &[&str]) -> Result<String> {
        let scope = if self == Self::SystemdUser { "--user" } else { "--system" };
        call(Command::new("systemctl").arg(scope).args(args))
    }

    /// Whether there is such a manager, which is not so in most containers.
    fn check(self) -> Result<()> {
        let (what, answer) = match self {
            Self::SystemdUser => ("systemd for this user", self.systemctl(&["show-environment"])),
            Self::SystemdSystem => ("systemd", self.systemctl(&["show-environment"])),
            Self::LaunchdUser | Self::LaunchdSystem => {
                ("launchd", call(Command::new("launchctl").arg("version")))
            }
        };
        answer.map(|_| ()).map_err(|error| {
            Error::new(ErrorKind::Other, format_args!("there is no {what} here: {error}")).hint(
                "`connect up --detach` starts the agent now; to have it always, let what starts programs \
                 here run `connect up --service`",
            )
        })
    }
}

impl Service {
    /// The service that this home has, or would have.
    fn of(home: &Home, manager: Manager) -> Result<Self> {
        let dir = std::path::absolute(home.dir())?;
        let user_dir = std::env::home_dir();
        // Each home has its own; the usual one is called by the usual name.
        let suffix = if user_dir.as_ref().is_some_and(|user| user.join(".connect") == dir) {
            String::new()
        } else {
            let digest = hash16("home", &[dir.as_os_str().as_bytes()]);
            format!("-{:08x}", u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]))
        };
        let below_user = |path: &str| {
            user_dir.clone().map(|dir| dir.join(path)).ok_or_else(|| {
                Error::new(ErrorKind::Usage, "no home directory is known").hint("set HOME")
            })
        };
        let (dir, name, extension) = match manager {
            Manager::SystemdUser => {
                let config = std::env::var_os("XDG_CONFIG_HOME").filter(|dir| !dir.is_empty());
                let config = config.map_or_else(|| below_user(".config"), |dir| Ok(dir.into()))?;
                (config.join("systemd/user"), "connect-agent", "service")
            }
            Manager::SystemdSystem => ("/etc/systemd/system".into(), "connect-agent", "service"),
            Manager::LaunchdUser => {
                (below_user("Library/LaunchAgents")?, "io.github.private-connect.agent", "plist")
            }
            Manager::LaunchdSystem => {
                ("/Library/LaunchDaemons".into(), "io.github.private-connect.agent", "plist")
            }
        };
        let name = format!("{name}{suffix}");
        Ok(Self { manager, file: dir.join(format!("{name}.{extension}")), name })
    }

    /// The installed services of a home.
    fn installed(home: &Home) -> Vec<Self> {
        let both = [Manager::of(false), Manager::of(true)];
        let services = both.into_iter().filter_map(|manager| Self::of(home, manager).ok());
        services.filter(|service| service.file.exists()).collect()
    }

    fn is_active(&self) -> bool {
        if self.manager.is_systemd() {
            self.manager.systemctl(&["is-active", "--quiet", &self.name]).is_ok()
        } else {
            call(Command::new("launchctl").args(["print", &self.launchd_target()])).is_ok()
        }
    }

    fn launchd_domain(&self) -> String {
        if self.manager == Manager::LaunchdSystem {
            "system".to_owned()
        } else {
            format!("gui/{}", nix::unistd::getuid())
        }
    }

    fn launchd_target(&self) -> String {
        format!("{}/{}", self.launchd_domain(), self.name)
    }

    /// Starts it, now and with the system, by its definition as it is now.
    fn start(&self) -> Result<()> {
        if self.manager.is_systemd() {
            self.manager.systemctl(&["daemon-reload"])?;
            self.manager.systemctl(&["enable", &self.name])?;
            self.manager.systemctl(&["restart", &self.name])?;
        } else {
            // One that is not loaded cannot be unloaded.
            let _ = call(Command::new("launchctl").args(["bootout", &self.launchd_target()]));
            let file = self.file.as_os_str();
            call(Command::new("launchctl").arg("bootstrap").arg(self.launchd_domain()).arg(file))?;
        }
        Ok(())
    }

    fn remove(&self) -> Result<()> {
        let stopped = if self.manager.is_systemd() {
            self.manager.systemctl(&["disable", "--now", &self.name])
        } else {
            call(Command::new("launchctl").args(["bootout", &self.launchd_target()]))
        };
        fs::remove_file(&self.file).map_err(|error| self.unwritable(&error))?;
        if self.manager.is_systemd() {
            self.manager.systemctl(&["daemon-reload"])?;
        }
        stopped.map(|_| ())
    }

    fn unwritable(&self, error: &io::Error) -> Error {
        let told = Error::new(ErrorKind::Other, format_args!("`{}`: {error}", self.file.display()));
        if error.kind() == io::ErrorKind::PermissionDenied {
            return told.hint("a service of the whole system needs root: try it with `sudo`");
        }
        told.hint("the directory must be yours and writable")
    }

    /// Writes the definition; false when it was there already.
    fn write(&self, definition: &str) -> Result<bool> {
        if fs::read_to_string(&self.file).is_ok_and(|old| old == definition) {
            return Ok(false);
        }
        let written = (|| {
            let dir = self.file.parent().unwrap_or(Path::new("/"));
            fs::create_dir_all(dir)?;
            let temporary = dir.join(format!(".{}.tmp", self.name));
            fs::write(&temporary, definition)?;
            fs::rename(&temporary, &self.file)
        })();
        written.map_err(|error| self.unwritable(&error))?;
        Ok(true)
    }
}

/// Whether the system starts the agent of a home.
pub(crate) fn is_installed(home: &Home) -> bool {
    !Service::installed(home).is_empty()
}

async fn run_install(home: &Home, install: &cli::DaemonInstall, output: Output) -> Result<()> {
    home.load()?;
    let manager = Manager::of(install.system);
    if install.system && !nix::unistd::geteuid().is_root() {
        return Err(Error::new(
            ErrorKind::Usage,
            "only root can install a service of the whole system",
        )
        .hint(format_args!(
            "run it with `sudo CONNECT_HOME={}`, or leave `--system` out",
            std::path::absolute(home.dir())?.display()
        )));
    }
    manager.check()?;
    let service = Service::of(home, manager)?;
    let text = Definition::of(home, install)?.text(&service);
    let is_new = service.write(&text)?;
    if !is_new && service.is_active() {
        output.daemon_installed(&service, "The agent runs as a service already.");
        return Ok(());
    }
    if !service.is_active() && local::ask(home, &local::Command::Status).await?.is_some() {
        output.note("An agent is running here. It is stopped, and the service takes its place.");
        commands::stop(home).await?;
    }
    let started = async {
        service.start()?;
        commands::wait_for_agent(home, || Ok(false)).await
    };
    started.await.map_err(|error| {
        let log = crate::agent_log::path(home);
        error.hint(format_args!("its log is `{}`", log.display()))
    })?;
    output.daemon_installed(&service, "The agent runs as a service, and starts with the system.");
    if manager == Manager::SystemdUser && !lingers() {
        output.note(
            "It runs while you are logged in. To have it from the start of the system on: \
             loginctl enable-linger",
        );
    }
    Ok(())
}

/// Whether the user's services run without a login.
fn lingers() -> bool {
    let Ok(Some(user)) = nix::unistd::User::from_uid(nix::unistd::getuid()) else {
        return false;
    };
    let said = call(Command::new("loginctl").args(["show-user", "--property=Linger", &user.name]));
    said.is_ok_and(|said| said.contains("Linger=yes"))
}

fn run_uninstall(home: &Home, output: Output) -> Result<()> {
    let installed = Service::installed(home);
    if installed.is_empty() {
        output.note("No service of this home is installed.");
    }
    for service in installed {
        service.remove()?;
        output.note(format_args!("Removed {}", service.file.display()));
    }
    Ok(())
}

fn run_status(home: &Home, output: Output) -> Result<()> {
    let installed = Service::installed(home);
    if let Some(service) = installed.iter().find(|service| service.is_active()) {
        output.daemon_installed(service, "It is running.");
        return Ok(());
    }
    Err(match installed.first() {
        Some(service) => Error::new(
            ErrorKind::NoAgent,
            format_args!(
                "the service is installed, but not running (`{}`)",
                service.file.display()
            ),
        )
        .hint("`connect logs` says why; `connect daemon install` starts it again"),
        None => Error::new(ErrorKind::NoAgent, "no service of this home is installed")
            .hint("`connect daemon install` installs one"),
    })
}

/// Runs a program of the system to its end; what it printed.
fn call(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| {
        Error::new(ErrorKind::Other, format_args!("`{name}` cannot be run: {error}"))
    })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().next().unwrap_or("it failed without a word");
    Err(Error::new(ErrorKind::Other, format_args!("`{name}`: {said}")))
}

impl Definition {
    fn of(home: &Home, install: &cli::DaemonInstall) -> Result<Self> {
        let dir = std::path::absolute(home.dir())?;
        if dir.to_str().is_none() {
            return Err(Error::new(
                ErrorKind::Usage,
                format_args!(
                    "`{}` cannot be written into the definition of a service",
                    dir.display()
                ),
            )
            .hint("move the home to a path that is text, and set CONNECT_HOME to it"));
        }
        let user = if install.system {
            let owner = fs::metadata(&dir)?.uid();
            let user = nix::unistd::User::from_uid(owner.into()).ok().flatten();
            Some(user.map_or_else(|| owner.to_string(), |user| user.name))
        } else {
            None
        };
        if install.system && !home.socket_path()?.starts_with(home.dir()) {
            return Err(Error::new(
                ErrorKind::Usage,
                "the path of this home is too long for a service of the whole system",
            )
            .hint("move the home to a path of at most 90 bytes, and set CONNECT_HOME to it"));
        }
        let environment = CARRIED
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), std::env::var_os(name)?)))
            .collect();
        Ok(Self {
            program: std::env::current_exe()?,
            home: dir,
            user,
            encoding: install.run.encoding,
            environment,
        })
    }

    fn text(&self, service: &Service) -> String {
        if service.manager.is_systemd() { self.systemd() } else { self.launchd(&service.name) }
    }

    fn arguments(&self) -> [String; 4] {
        let encoding = commands::encoding_name(self.encoding);
        ["up", "--service", "--encoding", encoding].map(str::to_owned)
    }

    fn variables(&self) -> impl Iterator<Item = (&str, std::borrow::Cow<'_, str>)> {
        let home = [("CONNECT_HOME", self.home.to_string_lossy())];
        let others = self.environment.iter();
        home.into_iter().chain(others.map(|(name, value)| (name.as_str(), value.to_string_lossy())))
    }

    /// A unit, by systemd.service(5) and systemd.exec(5).
    fn systemd(&self) -> String {
        let program = quoted(&self.program.to_string_lossy()).replace('$', "$$");
        let mut text = String::from(
            "# Written by `connect daemon install`, which writes it anew.\n\n\
             [Unit]\n\
             Description=Private Connect ZK agent\n\
             Documentation=https://github.com/private-connect/zk\n",
        );
        if self.user.is_some() {
            text.push_str("Wants=network-online.target\nAfter=network-online.target\n");
        }
        text.push_str("StartLimitIntervalSec=0\n\n[Service]\nType=notify\nNotifyAccess=main\n");
        for (name, value) in self.variables() {
            text.push_str(&format!("Environment={}\n", quoted(&format!("{name}={value}"))));
        }
        text.push_str(&format!("ExecStart={program} {}\n", self.arguments().join(" ")));
        text.push_str(&format!(
            "Restart=always\n\
             RestartSec=2s\n\
             # 0: it was told to stop, as by `connect down`. Trying again does not mend the others.\n\
             RestartPreventExitStatus={FINAL}\n\
             TimeoutStopSec=15s\n\
             LimitNOFILE=524288\n\
             UMask=0077\n\n\
             LockPersonality=yes\n\
             MemoryDenyWriteExecute=yes\n\
             NoNewPrivileges=yes\n\
             RestrictAddressFamilies=AF_INET AF_INET6 AF_NETLINK AF_UNIX\n\
             RestrictNamespaces=yes\n\
             RestrictRealtime=yes\n\
             RestrictSUIDSGID=yes\n\
             SystemCallArchitectures=native\n"
        ));
        let Some(user) = &self.user else {
            text.push_str("\n[Install]\nWantedBy=default.target\n");
            return text;
        };
        // What only the system's manager can do; the home is all that the agent writes to.
        text.push_str(&format!(
            "\nUser={}\n\
             # For local ports below 1024.\n\
             AmbientCapabilities=CAP_NET_BIND_SERVICE\n\
             CapabilityBoundingSet=CAP_NET_BIND_SERVICE\n\
             PrivateDevices=yes\n\
             ProtectClock=yes\n\
             ProtectControlGroups=yes\n\
             ProtectHome=read-only\n\
             ProtectHostname=yes\n\
             ProtectKernelLogs=yes\n\
             ProtectKernelModules=yes\n\
             ProtectKernelTunables=yes\n\
             ProtectSystem=strict\n\
             ReadWritePaths={}\n\n\
             [Install]\n\
             WantedBy=multi-user.target\n",
            user.replace('%', "%%"),
            quoted(&self.home.to_string_lossy()),
        ));
        text
    }

    /// A property list, by launchd.plist(5).
    fn launchd(&self, label: &str) -> String {
        let string = |text: &str| format!("<string>{}</string>", escaped(text));
        let arguments: String = [self.program.to_string_lossy().into_owned()]
            .iter()
            .chain(&self.arguments())
            .map(|argument| format!("\t\t{}\n", string(argument)))
            .collect();
        let variables: String = self
            .variables()
            .map(|(name, value)| format!("\t\t<key>{name}</key>\n\t\t{}\n", string(&value)))
            .collect();
        let user = self.user.as_ref();
        let user = user.map(|user| format!("\t<key>UserName</key>\n\t{}\n", string(user)));
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
             <!DOCTYPE plist PUBLIC \"-//Apple//DTD PLIST 1.0//EN\" \
             \"http://www.apple.com/DTDs/PropertyList-1.0.dtd\">\n\
             <plist version=\"1.0\">\n<dict>\n\
             \t<key>Label</key>\n\t{}\n\
             \t<key>ProgramArguments</key>\n\t<array>\n{arguments}\t</array>\n\
             \t<key>EnvironmentVariables</key>\n\t<dict>\n{variables}\t</dict>\n{}\
             \t<key>RunAtLoad</key>\n\t<true/>\n\
             \t<key>KeepAlive</key>\n\t<dict>\n\t\t<key>SuccessfulExit</key>\n\t\t<false/>\n\t</dict>\n\
             \t<key>Umask</key>\n\t<integer>63</integer>\n\
             </dict>\n</plist>\n",
            string(label),
            user.unwrap_or_default(),
        )
    }
}

/// A word of a unit: quoted, with nothing in it that systemd would replace.
fn quoted(text: &str) -> String {
    let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%");
    format!("\"{}\"", text.replace('\n', "\\n"))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Tells a service manager that waits for it (sd_notify(3)). An abstract socket's name begins with `@`.
pub(crate) fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let sent = UnixDatagram::unbound().and_then(|socket| {
        let address = match path.as_bytes().strip_prefix(b"@") {
            #[cfg(target_os = "linux")]
            Some(name) => SocketAddr::from_abstract_name(name)?,
            #[cfg(not(target_os = "linux"))]
            Some(_) => return Err(io::ErrorKind::Unsupported.into()),
            None => SocketAddr::from_pathname(&path)?,
        };
        socket.send_to_addr(state.as_bytes(), &address)
    });
    if let Err(error) = sent {
        tracing::warn!(%error, state, "the service manager was not told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(user: Option<&str>) -> Definition {
        Definition {
            program: "/opt/50% off/connect".into(),
            home: "/srv/a \"b\" & <c>".into(),
            user: user.map(str::to_owned),
            encoding: Encoding::Binary,
            environment: vec![("CONNECT_LOG".to_owned(), "debug".into())],
        }
    }

    #[test]
    fn units_run_the_agent_of_the_home_until_it_is_told_to_stop() {
        let unit = definition(None).systemd();
        for line in [
            "ExecStart=\"/opt/50%% off/connect\" up --service --encoding binary",
            "Environment=\"CONNECT_HOME=/srv/a \\\"b\\\" & <c>\"",
            "Environment=\"CONNECT_LOG=debug\"",
            "Restart=always",
            "RestartPreventExitStatus=0 2 3 6 7",
            "WantedBy=default.target",
        ] {
            assert!(unit.lines().any(|other| other == line), "`{line}` is not in:\n{unit}");
        }
        assert!(!unit.contains("User="), "{unit}");
        let unit = definition(Some("alice")).systemd();
        for line in [
            "User=alice",
            "ProtectSystem=strict",
            "ReadWritePaths=\"/srv/a \\\"b\\\" & <c>\"",
            "WantedBy=multi-user.target",
        ] {
            assert!(unit.lines().any(|other| other == line), "`{line}` is not in:\n{unit}");
        }
    }

    #[test]
    fn property_lists_run_the_agent_of_the_home_until_it_is_told_to_stop() {
        let list = definition(Some("alice")).launchd("io.github.private-connect.agent");
        for part in [
            "<string>/opt/50% off/connect</string>\n\t\t<string>up</string>\n\t\t<string>--service</string>",
            "<key>CONNECT_HOME</key>\n\t\t<string>/srv/a \"b\" &amp; &lt;c&gt;</string>",
            "<key>UserName</key>\n\t<string>alice</string>",
            "<key>SuccessfulExit</key>\n\t\t<false/>",
            "<key>RunAtLoad</key>\n\t<true/>",
        ] {
            assert!(list.contains(part), "`{part}` is not in:\n{list}");
        }
    }
}
