//! `connect`: a thin command line on the library `connect_agent`.

mod agent_log;
mod cli;
mod commands;
mod daemon;
mod examples;
mod output;
mod passphrase;
mod sharing;
mod short;
mod suggest;
mod terminal;
mod usage;
mod welcome;

use std::process::ExitCode;

use connect_agent::{Error, ErrorKind};

use crate::{output::Output, short::Unreadable};

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    let json = args.iter().any(|arg| arg == "--json");
    let color = terminal::choice_in(&args);
    let cli = match short::parse(args) {
        Ok(cli) => cli,
        Err(unreadable) => return refuse(unreadable, &Output::new(json, false, color)),
    };
    let output = Output::new(cli.json, cli.quiet, cli.color);
    // One thread carries everything that moves: handing a packet from one to another costs more time
    // than sealing it. What computes for long has threads of its own (`spawn_blocking`).
    let runtime =
        match tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                output.error(&error.into());
                return ExitCode::FAILURE;
            }
        };
    match runtime.block_on(commands::run(cli, output)).and_then(|()| output::finish()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output.error(&error);
            ExitCode::from(error.kind.exit_code())
        }
    }
}

/// Says what is wrong with a command line; or prints the help or version that it asks for.
fn refuse(unreadable: Unreadable, output: &Output) -> ExitCode {
    let error = match unreadable {
        Unreadable::Line(error) if output.json && error.use_stderr() => {
            let text = error.to_string();
            let said = text.lines().next().unwrap_or_default();
            Error::new(ErrorKind::Usage, said.strip_prefix("error: ").unwrap_or(said))
                .hint("`--help` shows how the command is used")
        }
        Unreadable::Line(error) => error.exit(),
        Unreadable::Word(error) => error,
    };
    output.error(&error);
    ExitCode::from(error.kind.exit_code())
}
