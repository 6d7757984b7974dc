//! `connect-hub`: reads the command line, runs the library, prints, exits.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal as _, Write as _},
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    process::ExitCode,
};

use connect_hub::{
    HubError, Listening, Order,
    backup::Rows,
    config::{Command, LogFormat, Registration, TokenCommand},
    config_file::{self, Call, CallError},
    store::catalog::{Finding, Mend, Report},
};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::Level;
use tracing_subscriber::EnvFilter;

#[tokio::main]
async fn main() -> ExitCode {
    let call = match config_file::read(std::env::args_os()) {
        Ok(call) => call,
        Err(CallError::CommandLine(error)) => error.exit(),
        Err(CallError::File { message, hint }) => {
            return fail(&anyhow::anyhow!(message), Some(&hint), ExitCode::from(2));
        }
    };
    let cli = &call.cli;
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
    let log =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(colour);
    let format = cli.log_format;
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.with_ansi(false).json().flatten_event(true).init(),
    }
    match run(call).await {
        Ok(code) => code,
        Err(error) => {
            let hint = error.hint();
            let code = ExitCode::from(if error.is_usage() { 2 } else { 1 });
            let error = anyhow::Error::new(error);
            match format {
                LogFormat::Text => fail(&error, hint.as_deref(), code),
                LogFormat::Json => {
                    tracing::error!(hint, "{error:#}");
                    code
                }
            }
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

async fn run(call: Call) -> Result<ExitCode, HubError> {
    match call.cli.command.clone() {
        Command::Serve(args) => {
            let config = args.resolve()?;
            let registration = config.registration;
            let listening = |listening: &Listening| {
                // Before anybody can know that the hub is there: from then on signals are orders.
                let mut signals = Signals::take_over();
                announce(listening, registration);
                notify("READY=1");
                async move || {
                    let order = signals.next().await;
                    if order == Order::Stop {
                        notify("STOPPING=1");
                    }
                    order
                }
            };
            connect_hub::serve(config, listening).await?;
        }
        Command::Config(args) => {
            let _ = write!(io::stdout(), "{}", call.show(&args.resolve()?));
        }
        Command::Migrate(args) => {
            connect_hub::migrate(&args).await?;
            tracing::info!("the schema is up to date");
            if args.database_url.is_some() {
                tracing::info!(
                    "`serve` connects as connect_app: give that role a password, and `serve` its URL"
                );
            }
        }
        Command::RegistrationToken(TokenCommand::Create { expires, database }) => {
            let token = connect_hub::create_registration_token(&database, expires).await?;
            // A secret: stdout is for whoever called, the log is not.
            let _ = writeln!(io::stdout(), "{}", token.0);
        }
        Command::Backup { file, database } => {
            let rows = connect_hub::backup(&database, &file).await?;
            print_rows(&rows);
        }
        Command::Restore { file, replace, database } => {
            let rows = connect_hub::restore(&database, &file, replace).await?;
            print_rows(&rows);
            if database.database_url.is_some() {
                tracing::info!(
                    "`serve` connects as connect_app: if this server is new, give that role a password"
                );
            }
        }
        Command::Doctor { json, database } => {
            let report = connect_hub::inspect(&database).await?;
            print_report(&report, json);
            return Ok(ExitCode::from(u8::from(!report.findings.is_empty())));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// How many rows each table has.
fn print_rows(rows: &Rows) {
    let mut stdout = io::stdout().lock();
    for (table, rows) in rows {
        // With stdout gone the work is done all the same.
        let _ = writeln!(stdout, "{table} {rows}");
    }
}

/// What an inspection came to: what was looked at, then what is wrong with the SQL that mends it.
fn print_report(report: &Report, json: bool) {
    let mut stdout = io::stdout().lock();
    let mut text = String::new();
    if json {
        text = serde_json::to_string(report).unwrap_or_default();
        text.push('\n');
    } else {
        for line in &report.checked {
            let _ = writeln!(text, "checked   {line}");
        }
        for line in &report.unseen {
            let _ = writeln!(text, "not seen  {line}");
        }
        for Finding { object, problem, mend, .. } in &report.findings {
            let _ = writeln!(text, "\nFOUND     {object}: {problem}");
            match mend {
                Mend::Sql(sql) => {
                    for line in sql.lines() {
                        let _ = writeln!(text, "    {line}");
                    }
                }
                Mend::Advice(advice) => {
                    let _ = writeln!(text, "    -- {advice}");
                }
            }
        }
        let _ = match report.findings.len() {
            0 => writeln!(text, "\nnothing to mend (as role {})", report.role),
            found => writeln!(text, "\n{found} to mend; run the SQL as the owner or a superuser"),
        };
    }
    // With stdout gone there is nobody to tell.
    let _ = stdout.write_all(text.as_bytes());
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

/// Tells a service manager that waits for it (sd_notify(3)). An abstract socket's name begins with `@`.
fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let sent = UnixDatagram::unbound().and_then(|socket| {
        let address = match path.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&path)?,
        };
        socket.send_to_addr(state.as_bytes(), &address)
    });
    if let Err(error) = sent {
        tracing::warn!(%error, state, "the service manager was not told");
    }
}

/// The signals that the hub obeys. Until they are taken over they end the program.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    /// What SIGHUP means: a terminal that goes away must not leave PostgreSQL behind; without one it is the
    /// customary way to ask a service to read its files again.
    on_hangup: Order,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            on_hangup: if io::stdin().is_terminal() { Order::Stop } else { Order::Reload },
        })
    }

    fn take_over() -> TakenOver {
        let signals = Self::new();
        if let Err(error) = &signals {
            tracing::error!(%error, "signals cannot be received; stop me with SIGKILL");
        }
        TakenOver(signals.ok())
    }
}

/// The signals, if the system lets us have them.
struct TakenOver(Option<Signals>);

impl TakenOver {
    async fn next(&mut self) -> Order {
        let Some(signals) = &mut self.0 else {
            return std::future::pending().await;
        };
        tokio::select! {
            _ = signals.terminate.recv() => Order::Stop,
            _ = signals.interrupt.recv() => Order::Stop,
            _ = signals.hangup.recv() => signals.on_hangup,
        }
    }
}
