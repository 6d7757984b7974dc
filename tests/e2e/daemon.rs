//! The agent as a service of the system, and its log. There is no systemd in a test, so the units are run by
//! what stands in for it: a script that does what `systemctl` is asked for, and the reading of the unit here.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        net::UnixDatagram,
    },
    path::PathBuf,
    process::Command,
};

use connect_tests::{
    PATIENCE, eventually,
    home::{Home, Workspace},
    hub::Hub,
    process::{Outcome, Process, new_dir},
    random_word,
    services::Service,
};

/// Does to one unit what `systemctl --user` does.
const SYSTEMCTL: &str = r#"#!/bin/sh
[ "$1" = --user ] || exit 1
echo "$2" >> "$STAND_IN/calls"
unit=$XDG_CONFIG_HOME/systemd/user/$3.service
# One that ended and that nobody waits for has no program.
runs() { [ -f "$STAND_IN/pid" ] && readlink "/proc/$(cat "$STAND_IN/pid")/exe" > /dev/null; }
stop() {
    runs && kill "$(cat "$STAND_IN/pid")"
    while runs; do sleep 0.05; done
}
case $2 in
    restart)
        stop
        (
            exec > /dev/null 2>&1 < /dev/null
            eval "exec env -i $(sed -n 's/^Environment=//p' "$unit" | tr '\n' ' ') \
                setsid $(sed -n 's/^ExecStart=//p' "$unit")"
        ) &
        echo $! > "$STAND_IN/pid"
        ;;
    disable) unit=$XDG_CONFIG_HOME/systemd/user/$4.service; stop ;;
    is-active) runs ;;
esac
"#;

/// A machine with what stands in for systemd.
struct Machine {
    dir: PathBuf,
}

impl Machine {
    fn new() -> Self {
        let dir = new_dir("machine");
        let systemctl = dir.join("systemctl");
        fs::write(&systemctl, SYSTEMCTL).expect("our own directory");
        fs::set_permissions(&systemctl, fs::Permissions::from_mode(0o755)).expect("our own file");
        Self { dir }
    }

    fn command(&self, home: &Home, args: &[&str]) -> Command {
        let mut command = home.command(args);
        let path = std::env::var("PATH").expect("there is a PATH");
        command
            .env("PATH", format!("{}:{path}", self.dir.display()))
            .env("XDG_CONFIG_HOME", self.dir.join("config"))
            .env("STAND_IN", &self.dir);
        command
    }

    fn run(&self, home: &Home, args: &[&str]) -> Outcome {
        Process::spawn("connect daemon", &mut self.command(home, args)).outcome()
    }

    #[track_caller]
    fn ok(&self, home: &Home, args: &[&str]) -> (String, String) {
        let Outcome { code, stdout, stderr } = self.run(home, args);
        assert_eq!(code, Some(0), "connect {args:?}:\n{stdout}\n{stderr}");
        (stdout.trim_end().to_owned(), stderr)
    }

    /// How often `systemctl` was asked for something.
    fn calls(&self, what: &str) -> usize {
        let calls = fs::read_to_string(self.dir.join("calls")).unwrap_or_default();
        calls.lines().filter(|call| *call == what).count()
    }
}

/// What the unit runs, read as systemd does: words in double quotes, `%%` and `$$` for `%` and `$`.
fn command_of(unit: &str) -> Command {
    let value =
        |name: &str| unit.lines().filter_map(|line| line.strip_prefix(name)).collect::<Vec<_>>();
    let words = |line: &str| {
        let mut words = vec![String::new()];
        let (mut is_quoted, mut characters) = (false, line.chars());
        while let Some(character) = characters.next() {
            let word = words.last_mut().expect("one at least");
            match character {
                '"' => is_quoted = !is_quoted,
                '\\' => word.extend(characters.next()),
                '%' | '$' => {
                    assert_eq!(characters.next(), Some(character), "{line}");
                    word.push(character);
                }
                ' ' if !is_quoted => words.push(String::new()),
                other => word.push(other),
            }
        }
        words
    };
    let [start] = value("ExecStart=")[..] else { panic!("{unit}") };
    let start = words(start);
    let mut command = Command::new(&start[0]);
    command.args(&start[1..]).env_clear().current_dir("/");
    for variable in value("Environment=") {
        let [variable] = &words(variable)[..] else { panic!("{variable}") };
        let (name, value) = variable.split_once('=').expect("a name and a value");
        command.env(name, value);
    }
    command
}

#[track_caller]
fn check_greeted(address: SocketAddr) {
    eventually("the service is reached", || {
        let Ok(mut client) = TcpStream::connect(address) else {
            return false;
        };
        client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
        let mut read = [0; 5];
        client.write_all(b"ping").is_ok()
            && client.read_exact(&mut read).is_ok()
            && read == *b"hello"
    });
}

#[test]
fn service_is_installed_once_used_stopped_and_removed() {
    let machine = Machine::new();
    let home = Workspace::found(Hub::shared()).founder;
    let (file, said) = machine.ok(&home, &["daemon", "install"]);
    assert!(said.contains("starts with the system"), "{said}");
    assert!(said.contains("loginctl enable-linger"), "{said}");
    assert!(fs::metadata(&file).is_ok(), "{file}");
    eventually("the agent is connected", || home.run(&["status"]).code == Some(0));
    assert_eq!(machine.ok(&home, &["daemon", "status"]).0, file);

    // Once more changes nothing; another option is another definition.
    let (_, said) = machine.ok(&home, &["daemon", "install"]);
    assert!(said.contains("already"), "{said}");
    assert_eq!(machine.calls("restart"), 1);
    machine.ok(&home, &["daemon", "install", "--encoding", "binary"]);
    assert_eq!(machine.calls("restart"), 2);
    assert!(fs::read_to_string(&file).expect("the unit").contains("--encoding binary"));

    // Told to stop it ends with 0, after which the unit starts nothing.
    let (_, said) = machine.ok(&home, &["down"]);
    assert!(said.contains("connect daemon uninstall"), "{said}");
    let unit = fs::read_to_string(&file).expect("the unit");
    assert!(unit.contains("\nRestart=always\nRestartSec=2s\n"), "{unit}");
    assert!(unit.contains("\nRestartPreventExitStatus=0 "), "{unit}");
    let agent = Process::spawn("ExecStart", &mut command_of(&unit));
    eventually("the agent is connected", || home.run(&["status"]).code == Some(0));
    home.ok(&["down"]);
    assert_eq!(agent.outcome().code, Some(0));
    let outcome = machine.run(&home, &["daemon", "status"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(9), ""));
    assert!(outcome.stderr.contains("connect daemon install"), "{}", outcome.stderr);

    machine.ok(&home, &["daemon", "install"]);
    machine.ok(&home, &["daemon", "uninstall"]);
    assert!(fs::metadata(&file).is_err(), "it is removed");
    home.fails(&["status"], 9, "connect up");
    let (_, said) = machine.ok(&home, &["daemon", "uninstall"]);
    assert!(said.contains("No service"), "{said}");
    assert_eq!(machine.run(&home, &["daemon", "status"]).code, Some(9));
}

#[test]
fn running_agent_hands_over_to_the_service() {
    let machine = Machine::new();
    let home = Workspace::found(Hub::shared()).founder;
    let service = Service::greeting(b"hello");
    let name = format!("svc-{}", random_word());
    let agent = home.up();
    home.ok(&["expose", &service.address().to_string(), "--name", &name]);
    let address = home.reach(&name);
    let (_, said) = machine.ok(&home, &["daemon", "install"]);
    assert!(said.contains("takes its place"), "{said}");
    assert_eq!(agent.outcome().code, Some(0));
    check_greeted(address);
    // The service is there; another agent is not.
    let outcome = home.run(&["up"]);
    assert!(outcome.stderr.contains("already running"), "{}", outcome.stderr);
    home.fails(&["up", "--service"], 1, "connect down");
    machine.ok(&home, &["daemon", "uninstall"]);
}

#[test]
fn without_a_service_manager_it_is_said_what_to_do_instead() {
    let home = Workspace::found(Hub::shared()).founder;
    let before = home.snapshot();
    // A directory without programs.
    let mut command = home.command(&["daemon", "install"]);
    let config = new_dir("config");
    command.env("PATH", new_dir("empty")).env("XDG_CONFIG_HOME", &config);
    let outcome = Process::spawn("connect daemon", &mut command).outcome();
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(1), ""), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("connect up --detach"), "{}", outcome.stderr);
    assert_eq!(fs::read_dir(config).expect("ours").count(), 0, "nothing was written");
    assert_eq!(home.snapshot(), before);
    Home::new().fails(&["daemon", "install"], 3, "connect join");
}

#[test]
fn after_a_reboot_everything_is_back_where_it_was() {
    let machine = Machine::new();
    let mut hub = Hub::start(&[]);
    let workspace = Workspace::found(&hub);
    let (exposer, reacher) = (&workspace.founder, workspace.join("reacher"));
    let services = [Service::greeting(b"hello"), Service::greeting(b"hello")];
    let names = [random_word(), random_word()].map(|word| format!("svc-{word}"));
    let mut units = Vec::new();
    let mut agents = Vec::new();
    for home in [exposer, &reacher] {
        let file = machine.ok(home, &["daemon", "install"]).0;
        units.push(fs::read_to_string(file).expect("the unit"));
        machine.ok(home, &["down"]);
        agents.push(Process::spawn("ExecStart", &mut command_of(units.last().expect("one"))));
        eventually("the agent is connected", || home.run(&["status"]).code == Some(0));
    }
    let addresses: Vec<_> = names
        .iter()
        .zip(&services)
        .zip([None, Some("127.0.0.41")])
        .map(|((name, service), bind)| {
            exposer.ok(&["expose", &service.address().to_string(), "--name", name]);
            let bind: Vec<_> = bind.iter().flat_map(|bind| ["--bind", bind]).collect();
            let address = reacher.ok(&[&["reach", name][..], &bind].concat());
            address.parse().expect("stdout is the local address")
        })
        .collect();
    for address in &addresses {
        check_greeted(*address);
    }
    let before = exposer.json(&["status"])["exposed"].clone();

    for mut agent in agents {
        agent.kill();
    }
    hub.kill();
    for home in [exposer, &reacher] {
        assert!(home.dir().join("agent.sock").exists(), "nobody could clean up");
        assert!(home.dir().join("agent.lock").exists(), "nobody could clean up");
    }
    // The agents are first: what they need comes later.
    let sockets: Vec<_> = units
        .iter()
        .map(|unit| {
            let path = new_dir("notify").join("socket");
            let socket = UnixDatagram::bind(&path).expect("a socket");
            socket.set_read_timeout(Some(PATIENCE)).expect("our own socket");
            let agent = Process::spawn("ExecStart", command_of(unit).env("NOTIFY_SOCKET", &path));
            let mut said = [0; 64];
            let length = socket.recv(&mut said).expect("it says that it is up");
            assert_eq!(&said[..length], b"READY=1");
            agent
        })
        .collect();
    hub.restart();
    for address in &addresses {
        check_greeted(*address);
    }
    eventually("all is as it was", || exposer.json(&["status"])["exposed"] == before);
    let status = reacher.json(&["status"]);
    for (name, address) in names.iter().zip(&addresses) {
        let reached = status["reached"].as_array().expect("a list").iter();
        let found = reached.filter(|reached| reached["name"] == name.as_str()).collect::<Vec<_>>();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0]["address"], address.to_string());
    }
    drop(sockets);
}

#[test]
fn log_is_shown_followed_and_kept_small() {
    let home = Workspace::found(Hub::shared()).founder;
    home.fails(&["logs"], 1, "connect up --detach");
    // One that is nearly full: the agent's first words are too much.
    let path = home.dir().join("agent.log");
    let old = "an old line\n".repeat(5 * 1024 * 1024 / 12);
    fs::write(&path, &old).expect("our own directory");
    assert_eq!(home.ok(&["logs", "-n", "2"]), "an old line\nan old line");
    let follower = Process::spawn("connect logs", &mut home.command(&["logs", "-f", "-n", "1"]));
    follower.stdout_line(|line| (line == "an old line").then_some(()));

    home.ok(&["up", "--detach"]);
    // Through the change of the file.
    follower.stdout_line(|line| line.contains(" connected hub=").then_some(()));
    let older = fs::read_to_string(home.dir().join("agent.log.1")).expect("it was renamed");
    assert_eq!(older, old);
    let metadata = fs::metadata(&path).expect("there is a new one");
    assert!(metadata.len() < 100_000, "{}", metadata.len());
    assert_eq!(metadata.mode() & 0o777, 0o600);
    assert!(home.ok(&["logs"]).contains(" connected hub="));
    assert_eq!(home.ok(&["logs", "-n", "1"]).lines().count(), 1);
    let line = home.json(&["logs", "-n", "1"]);
    assert!(line["line"].is_string(), "{line}");
    // All that is there, older first.
    assert!(home.ok(&["daemon", "logs", "-n", "10000000"]).starts_with("an old line\n"));
    home.ok(&["down"]);
    assert!(!fs::read_to_string(&path).expect("text").contains('\x1b'), "no colours in a file");
}

#[test]
fn agent_that_ends_at_once_says_why() {
    let home = Workspace::found(Hub::shared()).founder;
    fs::write(home.dir().join("state.json"), "{").expect("our own directory");
    // By the exit code of the agent, as in the foreground.
    for line in [&["up", "--detach"][..], &["up"]] {
        home.fails(line, 7, "state.json` is damaged");
        home.fails(line, 7, "move it away");
    }
    assert!(home.ok(&["logs"]).contains("state.json` is damaged"), "the log says it, too");
}
