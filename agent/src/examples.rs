//! The examples below the help of each command.

use clap::{Command, CommandFactory};

use crate::cli::Cli;

/// For each command that does something: its name, and lines that one can type.
const EXAMPLES: [(&str, &[&str]); 40] = [
    (
        "init",
        &[
            "connect init --hub http://127.0.0.1:7420",
            "CONNECT_REGISTRATION_TOKEN=TOKEN connect init --hub https://hub.example.com --label web-1",
        ],
    ),
    ("invite", &["connect invite", "connect invite --uses 20 --expires 7d --tag backend"]),
    ("join", &["connect join pc1…", "connect join - --label web-2 < code"]),
    ("up", &["connect up --detach", "CONNECT_LOG=debug connect up"]),
    ("down", &["connect down"]),
    ("logs", &["connect logs", "connect logs --follow -n 20"]),
    (
        "daemon install",
        &[
            "connect daemon install",
            "sudo CONNECT_HOME=$HOME/.connect connect daemon install --system",
        ],
    ),
    ("daemon uninstall", &["connect daemon uninstall"]),
    ("daemon status", &["connect daemon status"]),
    ("daemon logs", &["connect daemon logs --follow"]),
    (
        "expose",
        &[
            "connect expose localhost:5432 --name prod-db",
            "connect expose 10.0.0.7:22 --name bastion --allow admin",
            "connect 5432",
        ],
    ),
    ("unexpose", &["connect unexpose prod-db"]),
    (
        "reach",
        &[
            "connect reach prod-db",
            "connect reach prod-db --port 15432",
            "connect reach prod-db --check --speed",
            "connect reach staging-db --bind 127.0.0.2",
            "psql -h 127.0.0.1 -p \"$(connect reach prod-db --quiet | cut -d: -f2)\"",
            "connect prod-db",
        ],
    ),
    ("unreach", &["connect unreach prod-db"]),
    ("services", &["connect services", "connect services --json"]),
    ("agents", &["connect agents"]),
    (
        "share",
        &[
            "connect share prod-db --expires 7d --name acme-contractor",
            "connect share web api --uses 3",
        ],
    ),
    ("shares", &["connect shares", "connect shares --json"]),
    ("unshare", &["connect unshare acme-contractor"]),
    ("leave", &["connect leave acme-contractor"]),
    ("trust log", &["connect trust log"]),
    ("trust add-signer", &["connect trust add-signer web-1 --role owner"]),
    ("trust remove-signer", &["connect trust remove-signer web-1"]),
    ("trust role", &["connect trust role web-1 reacher"]),
    ("trust policy", &["connect trust policy strict"]),
    ("trust settle", &["connect trust settle"]),
    ("trust recover", &["connect trust recover < words"]),
    (
        "trust passphrase",
        &[
            "connect trust passphrase",
            "connect trust passphrase --new-passphrase-file - < passphrase",
        ],
    ),
    ("verify", &["connect verify", "connect verify web-1"]),
    ("invites", &["connect invites", "connect invites --revoke 00112233445566778899aabbccddeeff"]),
    ("revoke", &["connect revoke web-1", "connect revoke web-1 --yes"]),
    ("rotate", &["connect rotate"]),
    ("status", &["connect status", "connect status --json"]),
    ("doctor", &["connect doctor", "connect doctor --json"]),
    ("audit", &["connect audit --since 1h", "connect audit --follow"]),
    ("audit verify", &["connect audit verify"]),
    ("api-key create", &["connect api-key create --scope read --scope audit --expires 30d"]),
    ("api-key list", &["connect api-key list"]),
    ("api-key revoke", &["connect api-key revoke 00112233445566778899aabbccddeeff"]),
    (
        "completions",
        &[
            "source <(connect completions bash)     # in ~/.bashrc",
            "source <(connect completions zsh)      # in ~/.zshrc, below `compinit`",
            "connect completions fish > ~/.config/fish/completions/connect.fish",
        ],
    ),
];

/// The command line, with examples.
pub(crate) fn command() -> Command {
    EXAMPLES.iter().fold(Cli::command(), |command, (path, lines)| {
        let lines: Vec<_> = lines.iter().map(|line| format!("  {line}")).collect();
        add(command, path, &format!("Examples:\n{}", lines.join("\n")))
    })
}

fn add(command: Command, path: &str, text: &str) -> Command {
    let (name, rest) = path.split_once(' ').unwrap_or((path, ""));
    command.mut_subcommand(name, |command| {
        if rest.is_empty() { command.after_help(text.to_owned()) } else { add(command, rest, text) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::short;

    /// The paths of all commands that do something.
    fn leaves(command: &Command, path: &str) -> Vec<String> {
        let below = command.get_subcommands().flat_map(|below| {
            let path = format!("{path} {}", below.get_name());
            leaves(below, path.trim_start())
        });
        let is_leaf = !path.is_empty() && !command.is_subcommand_required_set();
        is_leaf.then(|| path.to_owned()).into_iter().chain(below).collect()
    }

    #[test]
    fn every_command_has_examples_that_can_be_typed() {
        let mut missing = leaves(&Cli::command(), "");
        missing.retain(|path| EXAMPLES.iter().all(|(known, _)| known != path));
        assert!(missing.is_empty(), "without an example: {missing:?}");
        for line in EXAMPLES.iter().flat_map(|(_, lines)| lines.iter()) {
            let line = line.split('(').next_back().unwrap_or(line);
            let line = line.split([')', '|', '<', '>']).next().unwrap_or(line);
            let words = line.split_whitespace().skip_while(|word| *word != "connect");
            let args: Vec<_> = words.map(Into::into).collect();
            assert!(args.len() > 1, "{line}");
            if let Err(error) = short::parse(args) {
                panic!("{line}: {error:?}");
            }
        }
    }

    #[test]
    fn command_line_is_consistent() {
        command().debug_assert();
    }
}
