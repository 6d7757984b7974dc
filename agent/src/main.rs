//! `connect`: a thin command line on the library `connect_agent`.

mod cli;
mod commands;
mod output;
mod passphrase;
mod sharing;

use std::process::ExitCode;

use clap::Parser;

use crate::{cli::Cli, output::Output};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let output = Output { json: cli.json, quiet: cli.quiet };
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
    match runtime.block_on(commands::run(cli, output)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output.error(&error);
            ExitCode::from(error.kind.exit_code())
        }
    }
}
