//! What is in `hub/deploy`: every call, variable and setting in it is one that this program has.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use clap::{Arg, CommandFactory as _};
use connect_hub::{
    config::{Cli, Command, ServeConfig},
    config_file,
};

use crate::{process::HubProcess, template::place};

fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy")
}

fn text(name: &str) -> String {
    fs::read_to_string(dir().join(name)).unwrap()
}

/// Reads a call as the program would, with the configuration file that is here.
fn read(call: &str) -> Command {
    let words = call.split_whitespace().map(|word| match word {
        "/etc/connect-hub/connect-hub.toml" => dir().join("connect-hub.toml").into_os_string(),
        word => OsString::from(word),
    });
    config_file::read(words).unwrap_or_else(|error| panic!("{call}: {error}")).cli.command
}

fn serve(call: &str) -> ServeConfig {
    match read(call) {
        Command::Serve(args) => args.resolve().unwrap_or_else(|error| panic!("{call}: {error}")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_unit_runs_the_file_beside_it() {
    let unit = text("connect-hub.service");
    let call = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let config = serve(call);
    assert_eq!(config.data_dir, Path::new("/var/lib/connect-hub"));
    assert!(unit.contains("StateDirectory=connect-hub\n"));
    assert!(unit.contains("\nUser=connect-hub\n"));
    assert!(text("connect-hub.sysusers").contains("\nu connect-hub - "));
}

#[test]
fn what_the_file_only_mentions_can_be_set() {
    let whole = text("connect-hub.toml");
    let mentioned = whole.lines().filter_map(|line| line.strip_prefix("# "));
    let mentioned: Vec<_> =
        mentioned.filter(|line| line.contains(" = \"") || line.contains(" = [")).collect();
    assert!(mentioned.len() >= 5, "{mentioned:?}");
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("all.toml");
    fs::write(&path, format!("{whole}{}\n", mentioned.join("\n"))).unwrap();
    let config = serve(&format!("connect-hub --config {} serve", path.display()));
    assert!(!config.trusted_proxies.0.is_empty());
}

#[test]
fn proxies_stand_before_the_hub_that_they_describe() {
    for name in ["nginx.conf", "Caddyfile"] {
        let text = text(name);
        let line = text.lines().find(|line| line.contains("connect-hub serve")).unwrap();
        let config = serve(line.trim_start_matches('#'));
        assert!(config.trusted_proxies.trust("127.0.0.1".parse().unwrap()), "{name}");
        assert!(text.contains(&config.listen.to_string()), "{name}");
    }
}

#[test]
fn containers_use_commands_and_variables_that_exist() {
    let command = Cli::command();
    let mut known = BTreeSet::from(["CONNECT_HUB_PG_BIN".to_owned()]);
    let mut commands = vec![&command];
    while let Some(command) = commands.pop() {
        let names = command.get_arguments().filter_map(Arg::get_env);
        known.extend(names.map(|name| name.to_string_lossy().into_owned()));
        commands.extend(command.get_subcommands());
    }
    let mut seen = 0;
    for file in fs::read_dir(dir()).unwrap() {
        let text = fs::read_to_string(file.unwrap().path()).unwrap();
        let words =
            text.split(|character: char| !character.is_ascii_uppercase() && character != '_');
        for word in words.filter(|word| word.starts_with("CONNECT_HUB_")) {
            assert!(known.contains(word), "{word} is not a variable of the hub");
            seen += 1;
        }
    }
    assert!(seen > 5, "{seen}");

    let calls = [text("Containerfile"), text("compose.yaml")].join("\n");
    let calls = calls.lines().filter_map(|line| {
        let line = line.trim();
        let list = line.strip_prefix("CMD [").or_else(|| line.strip_prefix("command: ["))?;
        let words = list.trim_end_matches(']').split(", ").map(|word| word.trim_matches('"'));
        Some(words.collect::<Vec<_>>().join(" "))
    });
    let calls: Vec<_> = calls.filter(|call| !call.starts_with("psql ")).collect();
    assert_eq!(calls.len(), 4, "{calls:?}");
    for call in calls {
        read(&format!("connect-hub {call}"));
    }
}

/// The manager is told when the hub is ready, and when it stops.
#[tokio::test]
async fn a_service_manager_is_told() {
    let (temporary, data_dir) = place().await;
    let path = temporary.path().join("notify");
    let socket = tokio::net::UnixDatagram::bind(&path).unwrap();
    let listen = ["--listen", "127.0.0.1:0"];
    let hub = HubProcess::start_with(&data_dir, &listen, |command| {
        command.env("NOTIFY_SOCKET", &path);
    })
    .await;
    let mut told = [0; 64];
    let length = socket.recv(&mut told).await.unwrap();
    assert_eq!(&told[..length], b"READY=1");
    hub.stop().await;
    let length = socket.recv(&mut told).await.unwrap();
    assert_eq!(&told[..length], b"STOPPING=1");
}
