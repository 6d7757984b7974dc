//! What the command line says, word for word: arguments in; exit code, stdout and stderr out. The expected
//! texts are in `tests/said/`. After a change that is meant:
//!
//!     CONNECT_SAID=update make test
//!
//! and then look at the difference in Git before it is committed.

use std::{fs, path::Path};

use connect_tests::{
    eventually,
    home::{Home, Pair, Workspace},
    hub::Hub,
    process::Outcome,
    services::Service,
};
use regex::Regex;

/// What was said in one session.
#[derive(Default)]
struct Session {
    text: String,
    /// What differs from run to run, and what stands for it.
    replaced: Vec<(String, String)>,
}

impl Session {
    /// Runs `connect`, as `who` if there are several.
    fn run(&mut self, who: &str, home: &Home, args: &[&str]) {
        self.replaced.push((home.dir().display().to_string(), "[HOME]".to_owned()));
        let Outcome { code, stdout, stderr } = home.run(args);
        let code = code.map_or("a signal".to_owned(), |code| code.to_string());
        self.text.push_str(&format!("{who}$ connect {}\n", args.join(" ")));
        for (mark, text) in [("", stdout), ("2> ", stderr)] {
            for line in text.lines() {
                self.text.push_str(format!("{mark}{line}").trim_end());
                self.text.push('\n');
            }
        }
        self.text.push_str(&format!("exit {code}\n\n"));
    }

    /// Compares all of it with the expected text.
    #[track_caller]
    fn check(self, name: &str) {
        let mut said = self.text;
        for (text, placeholder) in &self.replaced {
            said = said.replace(text, placeholder);
        }
        for (pattern, placeholder) in [
            (r"\b[0-9a-f]{32,}\b", "[ID]"),
            (r"\b[0-9a-f]{8}\b", "[SHORT]"),
            (r"pc1[0-9a-z]{20,}", "[CODE]"),
            (r"\b(127\.0\.\d+\.\d+):\d{5}", "$1:[PORT]"),
            (r"\bport \d{5}\b", "port [PORT]"),
            (r"`[^` ]*` \(pid \d+\)", "`PROGRAM` (pid [PID])"),
            (r"\d+\.\d+ ms", "[MS] ms"),
            (r"confirmed \d+ s ago|not confirmed by a witness yet", "[CONFIRMED]"),
            (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?(\.\d+)?Z?( UTC)?", "[TIME]"),
            (r"connect \d+\.\d+\.\d+", "connect [VERSION]"),
            // The words of a workspace, and the digits of two agents.
            (r"(?m)^([a-z]{3,8} ){7}[a-z]{3,8}$", "[WORDS]"),
            (r"(?m)^(\d{5} ?)+$", "[DIGITS]"),
            // Columns whose width follows from what stands for something else now.
            (r" {3,}(target ok|target down|active|not active|connecting)", "  $1"),
        ] {
            let pattern = Regex::new(pattern).expect("a pattern");
            said = pattern.replace_all(&said, placeholder).into_owned();
        }
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("said").join(name);
        if std::env::var_os("CONNECT_SAID").is_some_and(|what| what == "update") {
            fs::write(&path, said).expect("the tree is writable");
            return;
        }
        let expected = fs::read_to_string(&path).unwrap_or_default();
        if said == expected {
            return;
        }
        let (mut old, mut new) = (expected.lines(), said.lines());
        let mut number = 0;
        loop {
            number += 1;
            let (old, new) = (old.next(), new.next());
            assert_eq!(new, old, "{name}:{number}; is it meant? See the head of said.rs\n\n{said}");
        }
    }
}

/// The commands below one, by its help.
fn below(home: &Home, path: &[&str]) -> Vec<String> {
    let help = home.ok(&[path, &["--help"]].concat());
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let commands = commands.take_while(|line| !line.is_empty());
    let names = commands.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    names.filter(|name| !name.is_empty() && *name != "help").map(str::to_owned).collect()
}

#[test]
fn help_of_every_command() {
    let home = Home::new();
    let mut session = Session::default();
    session.run("", &home, &["--help"]);
    session.run("", &home, &["--version"]);
    let mut commands = 0;
    for command in below(&home, &[]) {
        session.run("", &home, &[&command, "--help"]);
        for subcommand in below(&home, &[&command]) {
            session.run("", &home, &[&command, &subcommand, "--help"]);
        }
        commands += 1;
    }
    assert!(commands > 20, "{commands}");
    session.check("help.txt");
}

#[test]
fn every_command_on_a_machine_that_joined_nothing() {
    let home = Home::new();
    let mut session = Session::default();
    for line in [
        "",
        "--json",
        "prod-db",
        "localhost:5432",
        "exopse localhost:5432",
        "nonsense! --json",
        "init",
        "init --hub nonsense",
        "init --hub http://127.0.0.1:1",
        "init --hub http://hub.example.com:7420",
        "join",
        "join pc1nonsense",
        "invite",
        "invite --expires 5",
        "invite --uses 0",
        "invites",
        "invites --revoke nonsense",
        "up",
        "up --detach",
        "up --rotate-after 1m",
        "down",
        "logs",
        "daemon",
        "daemon install",
        "daemon status",
        "daemon uninstall",
        "expose",
        "expose nonsense",
        "expose localhost:0",
        "expose localhost:5432 --name not_a_name",
        "expose localhost:5432 --name status",
        "expose localhost:5432 --allow DBA",
        "unexpose prod-db",
        "reach",
        "reach prod-db",
        "reach prod-db --port 65536",
        "reach prod-db --bind 0.0.0.0",
        "unreach prod-db",
        "services",
        "agents",
        "verify",
        "verify web-1",
        "revoke web-1",
        "rotate",
        "status",
        "status --json",
        "audit",
        "audit --since yesterday",
        "audit verify",
        "trust log",
        "trust add-signer web-1",
        "trust remove-signer web-1",
        "trust role web-1 emperor",
        "trust role web-1 reacher",
        "trust policy strict",
        "trust settle",
        "trust recover",
        "trust passphrase",
        "api-key create",
        "api-key list",
        "api-key revoke nonsense",
        "completions tcsh",
        "status --color pink",
        "help nonsense",
    ] {
        session.run("", &home, &line.split_whitespace().collect::<Vec<_>>());
    }
    assert!(!home.dir().join("membership.json").exists());
    session.check("fresh.txt");
}

#[test]
fn a_session_of_two_agents() {
    let pair = Pair::start(Hub::shared());
    let service = Service::echo();
    let target = service.address().to_string();
    let (exposer, reacher) = (pair.exposer(), &pair.reacher);
    let mut session = Session::default();
    // The founder's agent closes the invite by which the other one joined.
    for home in [exposer, reacher] {
        eventually("the invite is closed", || home.json(&["status"])["trust"]["seq"] == 1);
    }
    session.run("exposer", exposer, &[]);
    session.run("exposer", exposer, &["services"]);
    session.run("exposer", exposer, &["expose", &target, "--name", "prod-db"]);
    session.run(
        "exposer",
        exposer,
        &["expose", &target, "--name", "a-service-with-quite-a-long-name"],
    );
    session.run("exposer", exposer, &["expose", "127.0.9.9:1", "--name", "down"]);
    session.run("reacher", reacher, &["expose", &target, "--name", "prod-db"]);
    session.run("reacher", reacher, &["services"]);
    session.run("reacher", reacher, &["agents"]);
    session.run("reacher", reacher, &["reach", "prod-db"]);
    session.run("reacher", reacher, &["reach", "prod-db", "--quiet"]);
    session.run("reacher", reacher, &["reach", "prod-bd"]);
    session.run("reacher", reacher, &["--json", "reach", "prod-bd"]);
    session.run("reacher", reacher, &["prdo-db"]);
    session.run(
        "reacher",
        reacher,
        &["reach", "a-service-with-quite-a-long-name", "--bind", "127.0.0.51"],
    );
    session.run("reacher", reacher, &["status"]);
    session.run("reacher", reacher, &["verify"]);
    session.run("reacher", reacher, &["verify", "founder"]);
    session.run("reacher", reacher, &["verify", "nobody"]);
    session.run("reacher", reacher, &["invite"]);
    session.run("reacher", reacher, &["revoke", "founder", "--yes"]);
    session.run("reacher", reacher, &["trust", "log"]);
    session.run("exposer", exposer, &["invites"]);
    session.run("exposer", exposer, &["revoke", "reacher"]);
    session.run("exposer", exposer, &["revoke", "founder", "--yes"]);
    session.run("exposer", exposer, &["api-key", "list"]);
    session.run("exposer", exposer, &["unexpose", "prod-bd"]);
    session.run("exposer", exposer, &["unexpose", "prod-db"]);
    session.run("reacher", reacher, &["unreach", "prod"]);
    session.run("reacher", reacher, &["unreach", "prod-db"]);
    session.run("reacher", reacher, &["up"]);
    session.run("reacher", reacher, &["down"]);
    session.run("reacher", reacher, &[]);
    session.run("reacher", reacher, &["status"]);
    session.check("session.txt");
}

#[test]
fn a_session_with_a_guest() {
    let workspace = Workspace::found(Hub::shared());
    let (giver, guest) = (&workspace.founder, Home::new());
    let _giver_agent = giver.up();
    let service = Service::greeting(b"SSH-2.0-test\r\n");
    let target = service.address().to_string();
    let mut session = Session::default();
    session.run("giver", giver, &["shares"]);
    session.run("giver", giver, &["share", "build-box"]);
    session.run("giver", giver, &["expose", &target]);
    session.run("giver", giver, &["expose", &target]);
    session.run("giver", giver, &["share", "ssh", "--expires", "7d", "--name", "acme"]);
    let code = giver.json(&["share", "ssh", "--name", "other", "--uses", "2"])["code"].clone();
    let code = code.as_str().expect("a code").to_owned();
    session.run("giver", giver, &["shares"]);
    session.replaced.push((code.clone(), "[CODE]".to_owned()));
    session.run("guest", &guest, &["join", &code, "--label", "contractor"]);
    session.run("guest", &guest, &["join", &code]);
    eventually("the service is there for guests", || guest.ok(&["services"]).contains("ssh"));
    session.run("guest", &guest, &["services"]);
    for line in [&["agents"][..], &["audit"], &["invite"], &["expose", &target], &["share", "ssh"]]
    {
        session.run("guest", &guest, line);
    }
    session.run("guest", &guest, &["reach", "ssh", "--check"]);
    session.run("guest", &guest, &["shares"]);
    session.run("guest", &guest, &["leave", "other"]);
    session.run("giver", giver, &["agents"]);
    session.run("giver", giver, &["unshare", "nobody"]);
    session.run("giver", giver, &["unshare", "other"]);
    session.run("guest", &guest, &["reach", "ssh", "--check"]);
    session.run("giver", giver, &["shares"]);
    session.run("giver", giver, &["status"]);
    session.check("guest.txt");
}
