//! Command lines that leave the command out: `connect 5432` exposes, `connect prod-db` reaches.

use std::ffi::OsString;

use clap::{ArgMatches, Command, FromArgMatches, error::ErrorKind as ClapError};
use connect_agent::{Error, Target};

use crate::{cli::Cli, examples, suggest, terminal};

/// Why a command line cannot be run.
#[derive(Debug)]
pub(crate) enum Unreadable {
    /// It is wrong in clap's terms, or only asks for help or the version.
    Line(clap::Error),
    /// It begins with a word that is neither a command nor can be a service.
    Word(Error),
}

/// Reads a command line. One whose first word is no command is read as the long form that it stands for,
/// with all of its options; [`Cli::short`] remembers the word.
pub(crate) fn parse(mut args: Vec<OsString>) -> Result<Cli, Unreadable> {
    let command = examples::command().color(terminal::choice_in(&args));
    let line = read(command.clone().allow_external_subcommands(true), &args)?;
    let commands = suggest::commands();
    let given = match line.subcommand() {
        Some((word, rest)) if !commands.iter().any(|command| command == word) => {
            let after = rest.get_many::<OsString>("").map_or(0, Iterator::count);
            Some((word.to_owned(), after))
        }
        Some(_) | None => None,
    };
    let Some((word, after)) = given else {
        return build(&line);
    };
    let is_target = word.contains(':') || word.parse::<Target>().is_ok();
    args.insert(args.len() - after - 1, if is_target { "expose" } else { "reach" }.into());
    match read(command, &args).and_then(|line| build(&line)) {
        Ok(cli) => Ok(Cli { short: Some(word), ..cli }),
        // `connect exopse localhost:5432` is no `reach` with too many arguments.
        Err(Unreadable::Line(error))
            if !is_target
                && error.use_stderr()
                && (error.kind() == ClapError::ValueValidation
                    || !suggest::nearest(&word, commands.iter().map(String::as_str))
                        .is_empty()) =>
        {
            Err(Unreadable::Word(suggest::unknown_word(&word, &[])))
        }
        Err(error) => Err(error),
    }
}

fn read(command: Command, args: &[OsString]) -> Result<ArgMatches, Unreadable> {
    command.try_get_matches_from(args).map_err(Unreadable::Line)
}

fn build(line: &ArgMatches) -> Result<Cli, Unreadable> {
    Cli::from_arg_matches(line)
        .map_err(|error| Unreadable::Line(error.format(&mut examples::command())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Command as Ours;

    fn parsed(line: &str) -> Result<Cli, Unreadable> {
        parse(["connect"].into_iter().chain(line.split_whitespace()).map(Into::into).collect())
    }

    #[test]
    fn targets_are_exposed_and_names_reached_with_all_options() {
        for line in
            ["5432 --name x --json", "--json :5432 --name x", "localhost:5432 --name=x --json"]
        {
            let cli = parsed(line).expect("an expose");
            assert!(cli.json, "{line}");
            let Some(Ours::Expose(expose)) = cli.command else { panic!("{line}") };
            assert_eq!(expose.name.expect("a name").as_str(), "x");
        }
        let cli = parsed("prod-db --port 5433 -q").expect("a reach");
        assert!(cli.quiet);
        let Some(Ours::Reach(reach)) = cli.command else { panic!("no reach") };
        assert_eq!((reach.name.as_str(), reach.port), ("prod-db", Some(5433)));
        assert_eq!(cli.short.as_deref(), Some("prod-db"));
        assert!(parsed("reach prod-db").expect("the long form").short.is_none());
        assert!(parsed("").expect("no command").command.is_none());
    }

    #[test]
    fn what_is_no_command_and_no_name_says_what_was_meant() {
        for line in ["exopse localhost:5432", "expose!", "_expose 5432"] {
            let Err(Unreadable::Word(error)) = parsed(line) else { panic!("{line}") };
            assert!(error.hint.is_some_and(|hint| hint.contains("`connect expose`")), "{line}");
        }
        // What is meant is clear, and wrong: the long form says so.
        for line in ["prod-db --prot 1", "localhost:port extra", "help nonsense"] {
            assert!(matches!(parsed(line), Err(Unreadable::Line(_))), "{line}");
        }
    }
}
