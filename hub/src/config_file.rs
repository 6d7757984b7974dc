//! The configuration file: the options of `serve` by their long names, in TOML.
//!
//! There is one list of options, the command line's. What a file says is put behind the call as if it had
//! been written there, unless an option or the environment says it already, and the whole is read once more:
//! so options win over the environment, that over the file, and that over defaults.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use clap::{
    Arg, ArgAction, ArgMatches, Command, CommandFactory as _, FromArgMatches as _,
    error::{ContextKind, ContextValue},
    parser::ValueSource,
};
use http::Uri;
use toml::{Spanned, Value, de::DeTable, de::DeValue};

use crate::config::{Cli, ServeConfig};

/// A call that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The command line or the environment is wrong, or help was asked for.
    #[error(transparent)]
    CommandLine(#[from] clap::Error),
    /// The file is wrong.
    #[error("{message}")]
    File {
        /// File, line and key, and what is wrong.
        message: String,
        /// What would be right.
        hint: String,
    },
}

/// A call, and where each setting of the hub comes from.
#[derive(Debug)]
pub struct Call {
    /// What is wanted.
    pub cli: Cli,
    settings: Vec<Setting>,
}

/// One option of `serve`.
struct Setting {
    key: String,
    /// As they were written, before they were read.
    values: Vec<String>,
    is_list: bool,
    source: Source,
}

impl std::fmt::Debug for Setting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The values may hold a password.
        f.debug_struct("Setting").field("key", &self.key).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    Option,
    Environment(String),
    File(usize),
    Default,
}

/// One line of the file.
struct Entry {
    id: String,
    long: String,
    values: Vec<String>,
    line: usize,
}

/// Reads a call, with the file that it names.
///
/// # Errors
/// [`CallError`].
pub fn read(args: impl IntoIterator<Item = OsString>) -> Result<Call, CallError> {
    let mut args: Vec<OsString> = args.into_iter().collect();
    let command = Cli::command();
    let given = command.clone().try_get_matches_from(&args)?;
    let path = given.get_one::<PathBuf>("config").cloned();
    let entries =
        path.as_deref().map_or_else(|| Ok(Vec::new()), |path| read_file(&command, path))?;
    let (_, leaf) = leaf(&given);
    for entry in &entries {
        let has_it = leaf.try_contains_id(&entry.id).is_ok();
        if has_it && !is_given(leaf, &entry.id) {
            let written = entry.values.iter().map(|value| format!("--{}={value}", entry.long));
            args.extend(written.map(OsString::from));
        }
    }
    let matches = command.clone().try_get_matches_from(&args)?;
    let cli = Cli::from_arg_matches(&matches)?;
    let settings = options(&command).map(|option| setting(&option, &entries, leaf, &matches));
    Ok(Call { cli, settings: settings.collect() })
}

/// The innermost subcommand, which also has the global options.
fn leaf(matches: &ArgMatches) -> (Option<&str>, &ArgMatches) {
    let (mut name, mut matches) = (None, matches);
    while let Some((inner, further)) = matches.subcommand() {
        (name, matches) = (Some(inner), further);
    }
    (name, matches)
}

/// Whether an option was given on the command line or in the environment.
fn is_given(matches: &ArgMatches, id: &str) -> bool {
    matches!(matches.value_source(id), Some(ValueSource::CommandLine | ValueSource::EnvVariable))
}

/// What a file can set: the options of `serve`, and those of all subcommands.
fn options(command: &Command) -> impl Iterator<Item = Arg> {
    let serve = command.find_subcommand("serve").expect("it is one of ours");
    let all = command.get_arguments().chain(serve.get_arguments());
    let all: Vec<Arg> = all
        .filter(|option| {
            option.get_long().is_some_and(|long| !["config", "help", "version"].contains(&long))
        })
        .cloned()
        .collect();
    all.into_iter()
}

fn key(option: &Arg) -> String {
    option.get_long().unwrap_or_default().replace('-', "_")
}

fn is_list(option: &Arg) -> bool {
    matches!(option.get_action(), ArgAction::Append)
}

fn read_file(command: &Command, path: &Path) -> Result<Vec<Entry>, CallError> {
    let shown = path.display();
    let text = fs::read_to_string(path).map_err(|error| CallError::File {
        message: format!("`{shown}`: {error}"),
        hint: "--config or CONNECT_HUB_CONFIG names this file".to_owned(),
    })?;
    let line_of = |offset: usize| text.get(..offset).unwrap_or(&text).matches('\n').count() + 1;
    let table = DeTable::parse(&text).map_err(|error| CallError::File {
        message: format!(
            "`{shown}`, line {}: {}",
            line_of(error.span().map_or(0, |span| span.start)),
            error.message().lines().collect::<Vec<_>>().join(", ")
        ),
        hint: "a line looks like `listen = \"127.0.0.1:7420\"`".to_owned(),
    })?;
    let mut entries = Vec::new();
    for (name, value) in table.into_inner() {
        let line = line_of(name.span().start);
        let name = name.into_inner();
        let wrong = |what: String, hint: String| CallError::File {
            message: format!("`{shown}`, line {line}, `{name}`: {what}"),
            hint,
        };
        let Some(option) = options(command).find(|option| key(option) == name) else {
            let keys: Vec<_> = options(command).map(|option| key(&option)).collect();
            return Err(wrong(
                "no such setting".to_owned(),
                format!("there are {}", keys.join(", ")),
            ));
        };
        let values = strings(value, is_list(&option)).map_err(|expected| {
            wrong(format!("expected {expected}"), "quote it as \"…\"".to_owned())
        })?;
        let long = option.get_long().unwrap_or_default().to_owned();
        for value in &values {
            check(command, &long, value).map_err(|what| {
                wrong(what, format!("`connect-hub serve --help` explains --{long}"))
            })?;
        }
        entries.push(Entry { id: option.get_id().to_string(), long, values, line });
    }
    Ok(entries)
}

/// The strings of a value.
fn strings(value: Spanned<DeValue<'_>>, is_list: bool) -> Result<Vec<String>, &'static str> {
    let expected = if is_list { "a string or a list of strings" } else { "a string" };
    let one = |value: DeValue<'_>| {
        if let DeValue::String(text) = value { Ok(text.into_owned()) } else { Err(expected) }
    };
    let value = value.into_inner();
    if let DeValue::Array(values) = value {
        if !is_list {
            return Err(expected);
        }
        return values.into_iter().map(|value| one(value.into_inner())).collect();
    }
    one(value).map(|text| vec![text])
}

/// Reads one value as the command line would, so that what is wrong with it has its line. The value itself,
/// which may hold a password, is not repeated.
fn check(command: &Command, long: &str, value: &str) -> Result<(), String> {
    let call = ["connect-hub".to_owned(), "serve".to_owned(), format!("--{long}={value}")];
    let Err(error) = command.clone().try_get_matches_from(call) else {
        return Ok(());
    };
    if let Some(cause) = std::error::Error::source(&error) {
        return Err(cause.to_string());
    }
    match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(valid)) if !valid.is_empty() => {
            Err(format!("expected {}", valid.join(" or ")))
        }
        _ => Err("this value cannot be".to_owned()),
    }
}

fn setting(option: &Arg, entries: &[Entry], given: &ArgMatches, all: &ArgMatches) -> Setting {
    let id = option.get_id().as_str();
    let entry = entries.iter().find(|entry| entry.id == id);
    let source = match (given.try_contains_id(id).ok().and_then(|_| given.value_source(id)), entry)
    {
        (Some(ValueSource::CommandLine), _) => Source::Option,
        (Some(ValueSource::EnvVariable), _) => {
            let name = option.get_env().map(|name| name.to_string_lossy().into_owned());
            Source::Environment(name.unwrap_or_default())
        }
        (_, Some(entry)) => Source::File(entry.line),
        (_, None) => Source::Default,
    };
    let (_, all) = leaf(all);
    let raw = all.try_get_raw(id).ok().flatten().into_iter().flatten();
    let values = raw.map(|value| value.to_string_lossy().into_owned()).collect();
    Setting { key: key(option), values, is_list: is_list(option), source }
}

impl Call {
    /// The settings of `serve` as a file that would set them, each with where it comes from. Passwords are
    /// left out.
    #[must_use]
    pub fn show(&self, config: &ServeConfig) -> String {
        let mut text = String::new();
        for Setting { key, values, is_list, source } in &self.settings {
            let source = match source {
                Source::Option => "an option".to_owned(),
                Source::Environment(name) => format!("the environment, {name}"),
                Source::File(line) => format!("the file, line {line}"),
                Source::Default => "default".to_owned(),
            };
            let mut values: Vec<_> = values.iter().map(|value| redact(value)).collect();
            if values.is_empty() {
                // Defaults that follow from other settings.
                values.extend(config.computed(key));
            }
            let value = if *is_list {
                Value::Array(values.into_iter().map(Value::String).collect())
            } else if let Some(value) = values.into_iter().next() {
                Value::String(value)
            } else {
                text.push_str(&format!("# {key} is not set\n"));
                continue;
            };
            text.push_str(&format!("{key} = {value} # {source}\n"));
        }
        text
    }
}

/// A URL without its password, everything else as it is. Whatever looks like a URL and cannot be read as one
/// is left out whole.
fn redact(value: &str) -> String {
    const REDACTED: &str = "REDACTED";
    let Some((scheme, rest)) = value.split_once("://") else {
        return value.to_owned();
    };
    if scheme == "http" || scheme == "https" {
        // A public URL has no user.
        return value.to_owned();
    }
    let (rest, query) =
        rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let bare = match rest.rsplit_once('@') {
        Some((user, place)) => {
            let (user, password) =
                user.split_once(':').map_or((user, false), |(user, _)| (user, true));
            let password = if password { format!(":{REDACTED}") } else { String::new() };
            format!("{scheme}://{user}{password}@{place}")
        }
        None => format!("{scheme}://{rest}"),
    };
    if rest.contains('@') && bare.parse::<Uri>().is_err() {
        return format!("{scheme}://{REDACTED}");
    }
    let query = query.map(|query| {
        let fields = query.split('&').map(|field| match field.split_once('=') {
            Some((name, _)) if name.contains("password") => format!("{name}={REDACTED}"),
            Some(_) | None => field.to_owned(),
        });
        fields.collect::<Vec<_>>().join("&")
    });
    query.map_or(bare.clone(), |query| format!("{bare}?{query}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Command as Wanted;

    fn file(text: &str) -> (tempfile::TempDir, String) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hub.toml");
        fs::write(&path, text).unwrap();
        let path = path.to_str().unwrap().to_owned();
        (dir, path)
    }

    fn read_with(text: &str, args: &[&str]) -> Result<Call, CallError> {
        let (_dir, path) = file(text);
        let all = ["connect-hub", "--config", &path].into_iter().chain(args.iter().copied());
        read(all.map(OsString::from))
    }

    fn shown(text: &str, args: &[&str]) -> String {
        let call = read_with(text, args).unwrap();
        let Wanted::Config(serve) = &call.cli.command else {
            panic!("another command");
        };
        call.show(&serve.clone().resolve().unwrap())
    }

    #[test]
    fn options_win_over_the_file_and_the_file_over_defaults() {
        let text = "# a comment\ndata_dir = \"/srv/hub\"\nlisten = \"127.0.0.1:1\"\nlog = \"warn\"\n\
                    public_url = [\"https://a.example\", \"https://b.example\"]\ndrain = \"5s\"\n";
        let shown = shown(text, &["config", "--listen", "127.0.0.1:2"]);
        for line in [
            "listen = \"127.0.0.1:2\" # an option",
            "data_dir = \"/srv/hub\" # the file, line 2",
            "log = \"warn\" # the file, line 4",
            "public_url = [\"https://a.example\", \"https://b.example\"] # the file, line 5",
            "drain = \"5s\" # the file, line 6",
            "admin_listen = \"127.0.0.1:7421\" # default",
            "registration = \"token\" # default",
            "trusted_proxy = [] # default",
            "# database_url is not set",
        ] {
            assert!(shown.lines().any(|shown| shown == line), "{line}\n{shown}");
        }
        // A list of options takes the place of the file's list.
        let replaced = ["config", "--public-url", "https://c.example"];
        let shown = super::tests::shown(text, &replaced);
        assert!(shown.contains("public_url = [\"https://c.example\"] # an option"), "{shown}");
    }

    #[test]
    fn what_is_shown_is_a_file_that_says_the_same() {
        let text = "data_dir = \"/srv/a \\\"b\\\"\"\ntrusted_proxy = [\"10.0.0.0/8\"]\n\
                    database_url = \"postgres://u:hunter2@db.example:5432/hub?sslpassword=hunter2\"\n";
        let first = shown(text, &["config"]);
        assert!(!first.contains("hunter2"), "{first}");
        assert!(first.contains("postgres://u:REDACTED@db.example:5432/hub?sslpassword=REDACTED"));
        let again = shown(&first, &["config"]);
        let settings = |text: &str| {
            let lines =
                text.lines().map(|line| line.split(" # ").next().unwrap_or(line).to_owned());
            lines.collect::<Vec<_>>()
        };
        assert_eq!(settings(&first), settings(&again));
    }

    #[test]
    fn passwords_are_left_out_however_they_are_written() {
        for (url, redacted) in [
            ("postgres://u@h/d", "postgres://u@h/d"),
            ("postgres://u:p@ss:w@h/d", "postgres://u:REDACTED@h/d"),
            (
                "postgres://u:p%40@[::1]:5/d?a=b&password=x",
                "postgres://u:REDACTED@[::1]:5/d?a=b&password=REDACTED",
            ),
            ("postgres:///d?host=/run", "postgres:///d?host=/run"),
            ("https://hub.example", "https://hub.example"),
            ("127.0.0.1:1", "127.0.0.1:1"),
        ] {
            assert_eq!(redact(url), redacted);
        }
        assert!(!redact("postgres://u:a/b@c d@h/d").contains("a/b"));
    }

    #[test]
    fn a_subcommand_takes_what_is_its_own() {
        let text = "data_dir = \"/srv/hub\"\nlisten = \"127.0.0.1:1\"\n";
        let call = read_with(text, &["migrate"]).unwrap();
        let Wanted::Migrate(database) = call.cli.command else {
            panic!("another command");
        };
        assert_eq!(database.data_dir, Some(PathBuf::from("/srv/hub")));
    }

    #[track_caller]
    fn check_refused(text: &str, says: &str) {
        let error = read_with(text, &["serve"]).unwrap_err();
        assert!(matches!(error, CallError::File { .. }), "{error}");
        let message = error.to_string();
        assert!(message.contains("hub.toml`") && message.contains(says), "{message}");
        assert!(!format!("{message} {error:?}").contains("hunter2"), "{error:?}");
    }

    #[test]
    fn mistakes_have_file_line_and_key() {
        check_refused("\nlisten = 7420\n", "line 2, `listen`: expected a string");
        check_refused("listen = \"nowhere\"\n", "line 1, `listen`: invalid socket address");
        check_refused("a = \"\"\n", "line 1, `a`: no such setting");
        check_refused("\n\nconfig = \"x\"\n", "line 3, `config`: no such setting");
        check_refused("[listen]\n", "line 1, `listen`: expected a string");
        check_refused("listen = [\"127.0.0.1:1\"]\n", "expected a string");
        check_refused("public_url = [1]\n", "expected a string or a list of strings");
        check_refused("registration = \"all\"\n", "expected open or token");
        check_refused("drain = \"soon\"\n", "`drain`: expected a number with s, m, h or d");
        check_refused("database_url = \"postgres://u:hunter2@h:port/\"\n", "not a PostgreSQL URL");
        check_refused("log = \"info\"\nlisten", "line 2: key with no value");
        check_refused("log = \"a\"\nlog = \"b\"\n", "line 2");
        let missing =
            read(["connect-hub", "--config", "/nonexistent", "serve"].map(OsString::from));
        assert!(missing.unwrap_err().to_string().contains("`/nonexistent`: No such file"));
    }
}
