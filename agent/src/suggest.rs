//! "Did you mean …?": what an unknown name or word was probably meant to be.

use std::time::Duration;

use clap::CommandFactory;
use connect_agent::{
    Error, ErrorKind, Home, Result,
    local::{self, Answer, Command as Ask},
};
use connect_spec::ids::ServiceName;

use crate::{cli::Cli, sharing};

/// How long the hub may take to list the services for a suggestion: a mistake is told soon, with or without.
const LIST_TIMEOUT: Duration = Duration::from_secs(3);
/// More suggestions than this are no help.
const MAX_SUGGESTIONS: usize = 3;
/// A part of a name is taken for the name from this length.
const MIN_PART: usize = 3;

/// Which names an agent was asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Own {
    Exposed,
    Reached,
}

/// The names of all commands.
pub(crate) fn commands() -> Vec<String> {
    let command = Cli::command();
    let names = command.get_subcommands().filter(|command| !command.is_hide_set());
    names.map(|command| command.get_name().to_owned()).chain(["help".to_owned()]).collect()
}

/// Those of the known names that the given one was probably meant to be, the likeliest first.
pub(crate) fn nearest<'k>(given: &str, known: impl IntoIterator<Item = &'k str>) -> Vec<&'k str> {
    let longest = (given.chars().count() / 3).max(1);
    let mut near: Vec<_> = known
        .into_iter()
        .filter_map(|name| {
            let distance = strsim::osa_distance(given, name);
            let is_part = given.len() >= MIN_PART && name.contains(given);
            (distance > 0 && (distance <= longest || is_part)).then_some((distance, name))
        })
        .collect();
    near.sort_unstable();
    near.dedup();
    near.into_iter().map(|(_, name)| name).take(MAX_SUGGESTIONS).collect()
}

/// The services that the workspace has, if its hub says so soon.
pub(crate) async fn services(home: &Home) -> Option<Vec<String>> {
    let services = tokio::time::timeout(LIST_TIMEOUT, sharing::services(home)).await.ok()?.ok()?;
    Some(services.into_iter().map(|service| service.name.to_string()).collect())
}

/// Refuses the word of `connect WORD` when it is probably a mistyped command: one that is near to a command,
/// that was never reached here, and that the workspace does not list as a service.
///
/// Without this, `connect statsu` on a machine without an agent would wait for a hub that is away.
pub(crate) async fn check_word(home: &Home, word: &str) -> Result<()> {
    let commands = commands();
    if nearest(word, commands.iter().map(String::as_str)).is_empty()
        || connect_agent::was_reached(home, word)
    {
        return Ok(());
    }
    let services = services(home).await.unwrap_or_default();
    if services.iter().any(|service| service == word) {
        return Ok(());
    }
    Err(unknown_word(word, &services))
}

/// Adds to the error of `reach` what was probably meant; after `connect WORD` also commands.
pub(crate) async fn for_reach(
    home: &Home,
    name: &ServiceName,
    is_short: bool,
    done: Result<()>,
) -> Result<()> {
    let Err(error) = done else {
        return Ok(());
    };
    if error.kind != ErrorKind::ServiceNotFound {
        return Err(error);
    }
    let services = services(home).await.unwrap_or_default();
    Err(if is_short {
        unknown_word(name.as_str(), &services)
    } else {
        with(error, nearest(name.as_str(), services.iter().map(String::as_str)))
    })
}

/// Adds to the error of `share` what was probably meant by the names that no service has.
pub(crate) async fn for_share<T>(
    home: &Home,
    wanted: &[ServiceName],
    done: Result<T>,
) -> Result<T> {
    let error = match done {
        Err(error) if error.kind == ErrorKind::ServiceNotFound => error,
        other => return other,
    };
    let services = services(home).await.unwrap_or_default();
    let known = || services.iter().map(String::as_str);
    let unknown = wanted.iter().filter(|name| known().all(|known| known != name.as_str()));
    let near = unknown.flat_map(|name| nearest(name.as_str(), known())).collect();
    Err(with(error, near))
}

/// Adds to the error of `unexpose` and `unreach` what was probably meant.
pub(crate) async fn for_own(
    home: &Home,
    name: &ServiceName,
    own: Own,
    done: Result<()>,
) -> Result<()> {
    let Err(error) = done else {
        return Ok(());
    };
    if error.kind != ErrorKind::ServiceNotFound {
        return Err(error);
    }
    let Ok(Some(Answer::Status(status))) = local::ask(home, &Ask::Status).await else {
        return Err(error);
    };
    let names: Vec<_> = match own {
        Own::Exposed => status.exposed.iter().map(|exposed| exposed.name.as_str()).collect(),
        Own::Reached => status.reached.iter().map(|reached| reached.name.as_str()).collect(),
    };
    Err(with(error, nearest(name.as_str(), names)))
}

/// The error for a word that is neither a command nor a service.
pub(crate) fn unknown_word(word: &str, services: &[String]) -> Error {
    let commands = commands();
    let mut near: Vec<_> = nearest(word, commands.iter().map(String::as_str));
    near.extend(nearest(word, services.iter().map(String::as_str)));
    near.sort_by_key(|name| strsim::osa_distance(word, name));
    near.truncate(MAX_SUGGESTIONS);
    let near: Vec<_> = near.into_iter().map(|name| format!("`connect {name}`")).collect();
    let error = Error::new(
        ErrorKind::ServiceNotFound,
        format_args!("`{word}` is neither a command nor a service"),
    );
    if near.is_empty() {
        return error
            .hint("`connect help` lists the commands, `connect services` what can be reached");
    }
    error.hint(format_args!(
        "did you mean {}? `connect help` lists the commands, `connect services` what can be reached",
        near.join(" or ")
    ))
}

fn with(error: Error, near: Vec<&str>) -> Error {
    if near.is_empty() {
        return error;
    }
    let near: Vec<_> = near.into_iter().map(|name| format!("`{name}`")).collect();
    let hint = match &error.hint {
        Some(hint) => format!("did you mean {}? {hint}", near.join(" or ")),
        None => format!("did you mean {}?", near.join(" or ")),
    };
    error.hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_found_and_others_are_not() {
        let known = ["prod-db", "prod-web", "staging-db", "expose", "unexpose"];
        let near = |given| nearest(given, known);
        assert_eq!(near("exopse"), ["expose"]);
        assert_eq!(near("prod-bd"), ["prod-db"]);
        assert_eq!(near("prod"), ["prod-db", "prod-web"]);
        assert_eq!(near("prod-web"), ["prod-db"], "what is known is no suggestion");
        assert_eq!(near("redis"), [""; 0]);
        assert_eq!(near("db"), [""; 0], "two letters are in too much");
    }

    #[test]
    fn every_command_is_found_without_one_of_its_letters() {
        for command in commands().iter().filter(|command| command.len() > MIN_PART) {
            let given = &command[..command.len() - 1];
            assert!(nearest(given, [command.as_str()]).contains(&command.as_str()), "{given}");
        }
    }
}
