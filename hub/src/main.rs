//! `connect-hub`: reads the command line, runs the library, prints, exits.

use std::{
    io::{self, IsTerminal as _, Write as _},
    process::ExitCode,
};

use clap::Parser as _;
use connect_hub::{
    HubError, Listening,
    config::{Cli, Command, Registration, TokenCommand},
};
use tokio::signal::unix::{SignalKind, signal};
use tracing::Level;
use tracing_subscriber::EnvFilter;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    // A bare level is about this program: those below it may log what passes through them.
    let directives = if cli.log.parse::<Level>().is_ok() || cli.log == "off" {
        format!("warn,connect_hub={}", cli.log)
    } else {
        cli.log.clone()
    };
    let Ok(filter) = EnvFilter::try_new(directives) else {
        return fail(
            &anyhow::anyhow!("`{}` is no log filter", cli.log),
            Some("try --log debug"),
            ExitCode::from(2),
        );
    };
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(colour)
        .init();
    match run(cli.command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let hint = error.hint();
            let code = ExitCode::from(if error.is_usage() { 2 } else { 1 });
            fail(&anyhow::Error::new(error), hint.as_deref(), code)
        }
    }
}

fn fail(error: &anyhow::Error, hint: Option<&str>, code: ExitCode) -> ExitCode {
    let mut stderr = io::stderr().lock();
    // With stderr gone there is nobody left to tell.
    let _ = writeln!(stderr, "error: {error:#}");
    if let Some(hint) = hint {
        let _ = writeln!(stderr, "hint: {hint}");
    }
    code
}

async fn run(command: Command) -> Result<(), HubError> {
    match command {
        Command::Serve(args) => {
            let config = args.resolve()?;
            let registration = config.registration;
            connect_hub::serve(
                config,
                |listening| announce(listening, registration),
                asked_to_stop(),
            )
            .await
        }
        Command::Migrate(args) => {
            connect_hub::migrate(&args).await?;
            tracing::info!("the schema is up to date");
            if args.database_url.is_some() {
                tracing::info!(
                    "`serve` connects as connect_app: give that role a password, and `serve` its URL"
                );
            }
            Ok(())
        }
        Command::RegistrationToken(TokenCommand::Create { expires, database }) => {
            let token = connect_hub::create_registration_token(&database, expires).await?;
            // A secret: stdout is for whoever called, the log is not.
            let _ = writeln!(io::stdout(), "{}", token.0);
            Ok(())
        }
    }
}

/// Tells the operator what is served, and prints the line with which the first agent starts.
fn announce(listening: &Listening, registration: Registration) {
    let Listening { agents, admin, init_url } = listening;
    tracing::info!(%agents, %admin, "ready");
    let token = match registration {
        Registration::Open => "",
        Registration::Token => {
            tracing::info!(
                "creating a workspace needs a token: `connect-hub registration-token create`"
            );
            " --registration-token TOKEN"
        }
    };
    // A closed stdout is no reason to stop serving.
    let _ = writeln!(io::stdout(), "connect init --hub {init_url}{token}");
}

/// Returns on SIGTERM, SIGINT, or SIGHUP: a terminal that goes away must not leave PostgreSQL behind.
async fn asked_to_stop() {
    let signals = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()];
    let signals: io::Result<Vec<_>> = signals.into_iter().map(signal).collect();
    match signals {
        Ok(mut signals) => {
            let received = signals.iter_mut().map(|signal| Box::pin(signal.recv()));
            futures_util::future::select_all(received).await;
        }
        Err(error) => {
            tracing::error!(%error, "signals cannot be received; stop me with SIGKILL");
            std::future::pending().await
        }
    }
}
