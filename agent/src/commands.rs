//! What each command does: asks the running agent, or the hub, or becomes the agent.

use std::{
    cell::OnceCell,
    fs,
    io::{BufRead, IsTerminal, Read},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Stdio},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::CommandFactory;
use connect_agent::{
    AuditReader, Directory, Error, ErrorKind, Governor, Home, HomeLock, Host, HubCa, Keep,
    LocalEnd, Options, Reaching, RekeyAfter, Result,
    local::{self, Answer, Command as Ask},
};
use connect_crypto::words::workspace_words;
use connect_spec::{
    audit::Scope,
    ids::{CredentialId, Label},
    log::Policy,
    objects::{AgentRole, SignerRole},
};
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    signal::Signal,
};
use tokio::signal::unix::{SignalKind, signal};
use zeroize::Zeroizing;

use crate::{
    agent_log,
    cli::{self, AuditCommand, Cli, Command, Encoding, Trust},
    daemon, examples,
    output::{self, Output},
    passphrase::Source,
    sharing,
    suggest::{self, Own},
    welcome,
};

/// Another process that holds the lock has its socket, or is gone, within this time.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(5);
/// An agent in the background must answer within this time.
const DETACH_TIMEOUT: Duration = Duration::from_secs(15);
/// Between looks at a process that is starting or stopping.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// A foreground command that finds no hub tries again after this time.
const RETRY: Duration = Duration::from_secs(1);

/// `audit --follow` looks for new rows this often.
const FOLLOW_PAUSE: Duration = Duration::from_secs(1);

/// Of what an agent says that ends as it starts.
const MAX_SAID_BYTES: u64 = 64 * 1024;

/// More than 24 words of any list.
const MAX_WORDS_BYTES: usize = 1024;

/// Runs one command.
pub(crate) async fn run(cli: Cli, output: Output) -> Result<()> {
    // A file that may not grow (RLIMIT_FSIZE) is an error to report and not the end of the agent.
    let _handled = signal(SignalKind::from_raw(Signal::SIGXFSZ as i32))?;
    let home = Home::from_env()?;
    let passphrase = Source { file: cli.passphrase_file };
    let Some(command) = cli.command else {
        return welcome::run(&home, output).await;
    };
    if is_for_members(&command) && home.load().is_ok_and(|identity| identity.share_id().is_some()) {
        return Err(Error::new(
            ErrorKind::Refused,
            "this command is for members of a workspace, and this home is the guest of a share",
        )
        .hint("`connect services` lists what is shared, `connect reach NAME` uses it"));
    }
    match command {
        Command::Init(init) => run_init(&home, init, output).await,
        Command::Invite(invite) => run_invite(&home, invite, &passphrase, output).await,
        Command::Join(join) => run_join(&home, join, output).await,
        Command::Up(up) => run_up(home, up, output).await,
        Command::Down => run_down(&home, output).await,
        Command::Logs(logs) => agent_log::show(&home, logs.lines, logs.follow, output).await,
        Command::Daemon(command) => daemon::run(&home, command, output).await,
        Command::Expose(expose) => run_expose(home, expose, output).await,
        Command::Unexpose { name } => {
            let done = tell(&home, &Ask::Unexpose { name: name.clone() }).await;
            suggest::for_own(&home, &name, Own::Exposed, done).await?;
            output.note(format_args!("{name} is not exposed any more."));
            Ok(())
        }
        Command::Reach(reach) => {
            let name = reach.name.clone();
            if let Some(word) = &cli.short {
                suggest::check_word(&home, word).await?;
            }
            let done = run_reach(home.clone(), reach, output).await;
            suggest::for_reach(&home, &name, cli.short.is_some(), done).await
        }
        Command::Unreach { name } => {
            let done = tell(&home, &Ask::Unreach { name: name.clone() }).await;
            suggest::for_own(&home, &name, Own::Reached, done).await?;
            output.note(format_args!("{name} is not reached any more."));
            Ok(())
        }
        Command::Services => {
            output::log_to_stderr("warn");
            output.services(&output.wait("Asking the hub", sharing::services(&home)).await?);
            Ok(())
        }
        Command::Share(share) => sharing::share(&home, share, &passphrase, output).await,
        Command::Shares => sharing::list(&home, output).await,
        Command::Unshare { share } => sharing::unshare(&home, &share, &passphrase, output).await,
        Command::Leave { share } => sharing::leave(&home, &share, output).await,
        Command::Agents => {
            output::log_to_stderr("warn");
            let listed = async { Directory::open(&home).await?.agents().await };
            output.agents(&output.wait("Asking the hub", listed).await?);
            Ok(())
        }
        Command::Invites { revoke } => run_invites(&home, revoke, &passphrase, output).await,
        Command::Revoke { agent, yes } => run_revoke(&home, &agent, yes, &passphrase, output).await,
        Command::Trust(trust) => run_trust(&home, trust, &passphrase, output).await,
        Command::Verify { agent } => run_verify(&home, agent.as_deref(), output).await,
        Command::Rotate => run_rotate(&home, output).await,
        Command::Status => run_status(&home, output).await,
        Command::Doctor => run_doctor(&home, output).await,
        Command::Audit(audit) => run_audit(&home, audit, output).await,
        Command::ApiKey(command) => run_api_key(&home, command, output).await,
        Command::Completions { shell } => {
            output.completions(shell, &mut examples::command());
            Ok(())
        }
    }
}

/// Whether a guest, who reaches what is shared with it and no more, has no use for a command.
fn is_for_members(command: &Command) -> bool {
    match command {
        Command::Invite(_)
        | Command::Invites { .. }
        | Command::Expose(_)
        | Command::Unexpose { .. }
        | Command::Agents
        | Command::Share(_)
        | Command::Unshare { .. }
        | Command::Trust(_)
        | Command::Revoke { .. }
        | Command::Audit(_)
        | Command::ApiKey(_) => true,
        Command::Verify { agent } => agent.is_some(),
        Command::Init(_)
        | Command::Join(_)
        | Command::Up(_)
        | Command::Down
        | Command::Logs(_)
        | Command::Daemon(_)
        | Command::Reach(_)
        | Command::Unreach { .. }
        | Command::Services
        | Command::Shares
        | Command::Leave { .. }
        | Command::Rotate
        | Command::Status
        | Command::Doctor
        | Command::Completions { .. } => false,
    }
}

async fn run_audit(home: &Home, audit: cli::Audit, output: Output) -> Result<()> {
    output::log_to_stderr("warn");
    let directory = Directory::open(home).await?;
    if let Some(AuditCommand::Verify) = audit.command {
        output.audit_verdict(&AuditReader::new(directory, None).await?.verify().await?);
        return Ok(());
    }
    let since = audit.since.map(|ago| {
        let time = SystemTime::now().checked_sub(ago).unwrap_or(UNIX_EPOCH);
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    });
    let mut reader = AuditReader::new(directory, since).await?;
    loop {
        // Shown once all of them hold.
        let mut rows = Vec::new();
        while let Some(row) = reader.next().await? {
            rows.push(row);
        }
        for row in &rows {
            output.audit_row(row);
        }
        output::flush();
        if !audit.follow || !output::is_read() {
            return Ok(());
        }
        tokio::time::sleep(FOLLOW_PAUSE).await;
    }
}

async fn run_api_key(home: &Home, command: cli::ApiKey, output: Output) -> Result<()> {
    output::log_to_stderr("warn");
    let directory = Directory::open(home).await?;
    match command {
        cli::ApiKey::Create { scopes, expires } => {
            let scopes = scopes.into_iter().map(|scope| match scope {
                cli::Scope::Read => Scope::Read,
                cli::Scope::Audit => Scope::Audit,
                cli::Scope::Write => Scope::Write,
            });
            output.api_key_created(&directory.create_api_key(scopes.collect(), expires).await?);
        }
        cli::ApiKey::List => output.api_keys(&directory.api_keys().await?),
        cli::ApiKey::Revoke { id } => {
            directory.revoke_api_key(id).await?;
            output.note("The key is revoked.");
        }
    }
    Ok(())
}

async fn run_init(home: &Home, init: cli::Init, output: Output) -> Result<()> {
    output::log_to_stderr("warn");
    let hub = init.hub.parse().map_err(|error| {
        Error::new(ErrorKind::Usage, format_args!("the hub's address is wrong: {error}"))
            .hint("a hub looks like `https://hub.example.com` or `http://127.0.0.1:7420`")
    })?;
    let label = init.label.unwrap_or_else(host_label);
    let ca = read_ca(&init.ca)?;
    let founding = connect_agent::init(home, &hub, ca, &label, init.registration_token);
    let founded = output.wait("Beginning a workspace", founding).await?;
    output.founded(&founded);
    Ok(())
}

async fn run_invite(
    home: &Home,
    invite: cli::Invite,
    passphrase: &Source,
    output: Output,
) -> Result<()> {
    let governor = govern(home, passphrase).await?;
    let cli::Invite { expires, uses, tags } = invite;
    output.invite(&governor.invite(expires, uses, tags).await?);
    close_due(&governor).await;
    Ok(())
}

/// Lets the signer of this home work.
pub(crate) async fn govern(home: &Home, passphrase: &Source) -> Result<Governor> {
    output::log_to_stderr("warn");
    Governor::new(Directory::open(home).await?, || passphrase.current())
}

/// Closes invites that are over while the signer key is at hand; a signer whose key is under a passphrase
/// has no agent that does.
async fn close_due(governor: &Governor) {
    if let Err(error) = governor.close_due().await {
        tracing::warn!(%error, "invites that are over were not closed");
    }
}

async fn run_invites(
    home: &Home,
    revoke: Option<CredentialId>,
    passphrase: &Source,
    output: Output,
) -> Result<()> {
    let Some(id) = revoke else {
        output::log_to_stderr("warn");
        let directory = Directory::open(home).await?;
        output.invites(&connect_agent::invites(&directory).await?);
        return Ok(());
    };
    let governor = govern(home, passphrase).await?;
    let seq = governor.close_invite(id).await?;
    close_due(&governor).await;
    output.signed(seq, format_args!("The invite is closed; who joined by it stays."));
    Ok(())
}

async fn run_revoke(
    home: &Home,
    agent: &str,
    yes: bool,
    passphrase: &Source,
    output: Output,
) -> Result<()> {
    let governor = govern(home, passphrase).await?;
    let member = governor.directory().member(agent).await?;
    let own = home.load()?.agent_id();
    if member.info.agent_id == own {
        return Err(Error::new(ErrorKind::Usage, "that is this agent itself")
            .hint("another signer can revoke it"));
    }
    if !yes {
        confirm(&format!(
            "Revoke {} ({}) for ever? [y/N] ",
            member.info.label, member.info.agent_id
        ))?;
    }
    let revoked = governor.revoke(&member).await?;
    close_due(&governor).await;
    output.revoked(&revoked);
    Ok(())
}

/// Asks a question on the terminal; without one, the flag must have answered it.
fn confirm(question: &str) -> Result<()> {
    if !std::io::stdin().is_terminal() {
        return Err(Error::new(
            ErrorKind::Usage,
            "this is for ever, and there is no terminal to ask",
        )
        .hint("say `--yes` if it is meant"));
    }
    output::prompt(question);
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        Ok(())
    } else {
        Err(Error::new(ErrorKind::Other, "nothing was changed").hint("answer `y`, or say `--yes`"))
    }
}

async fn run_trust(home: &Home, trust: Trust, passphrase: &Source, output: Output) -> Result<()> {
    match trust {
        Trust::Passphrase(args) => run_passphrase(home, &args, passphrase, output),
        Trust::Log => {
            output::log_to_stderr("warn");
            let directory = Directory::open(home).await?;
            output.log(&connect_agent::log(&directory).await?);
            Ok(())
        }
        Trust::AddSigner { agent, role } => {
            let governor = govern(home, passphrase).await?;
            let member = governor.directory().member(&agent).await?;
            let role = match role {
                cli::Signer::Admin => SignerRole::Admin,
                cli::Signer::Owner => SignerRole::Owner,
            };
            let seq = governor.add_signer(&member, role).await?;
            output.signed(seq, format_args!("{} is a signer now.", member.info.label));
            Ok(())
        }
        Trust::RemoveSigner { agent } => {
            let governor = govern(home, passphrase).await?;
            let member = governor.directory().member(&agent).await?;
            let seq = governor.remove_signer(&member).await?;
            output.signed(
                seq,
                format_args!(
                    "{} signs no longer; whom it admitted stays, and so does it.",
                    member.info.label
                ),
            );
            Ok(())
        }
        Trust::Role { agent, role } => {
            let governor = govern(home, passphrase).await?;
            let member = governor.directory().member(&agent).await?;
            let role = match role {
                cli::Role::Member => AgentRole::Member,
                cli::Role::Reacher => AgentRole::Reacher,
                cli::Role::Exposer => AgentRole::Exposer,
            };
            let seq = governor.change_role(&member, role).await?;
            output.signed(seq, format_args!("{} has another role now.", member.info.label));
            Ok(())
        }
        Trust::Policy { policy } => {
            let governor = govern(home, passphrase).await?;
            let policy = Policy { strict: policy == cli::PolicyName::Strict };
            let seq = governor.set_policy(policy).await?;
            output.signed(seq, format_args!("The policy is set."));
            Ok(())
        }
        Trust::Settle => {
            let governor = govern(home, passphrase).await?;
            let seq = governor.settle().await?;
            output.signed(seq, format_args!("The fork is settled."));
            Ok(())
        }
        Trust::Recover => run_recover(home, output).await,
    }
}

async fn run_recover(home: &Home, output: Output) -> Result<()> {
    output::log_to_stderr("warn");
    let directory = Directory::open(home).await?;
    if std::io::stdin().is_terminal() {
        output::prompt("The 24 recovery words: ");
    }
    // Reserved at once, so that growing leaves no copy.
    let mut words = Zeroizing::new(String::with_capacity(MAX_WORDS_BYTES));
    let limit = u64::try_from(MAX_WORDS_BYTES).unwrap_or(u64::MAX);
    std::io::stdin().lock().take(limit).read_line(&mut words)?;
    connect_agent::recover(&directory, &words, |recovered| output.recovered(recovered)).await?;
    output.note("Done.");
    Ok(())
}

fn run_passphrase(
    home: &Home,
    args: &cli::Passphrase,
    passphrase: &Source,
    output: Output,
) -> Result<()> {
    let identity = home.load()?;
    let was_locked = identity.signer_is_locked()?;
    let stdin = |file: &Option<_>| file.as_deref() == Some(Path::new("-"));
    if was_locked && stdin(&passphrase.file) && stdin(&args.new_passphrase_file) {
        return Err(Error::new(ErrorKind::Usage, "stdin holds one passphrase, not two")
            .hint("give one of them by a file"));
    }
    let signer = identity.unlock_signer(|| passphrase.current())?;
    if args.remove {
        home.set_passphrase(&identity, &signer, None)?;
        output.note("The signer key has no passphrase: whoever can read the file can sign.");
        return Ok(());
    }
    // There is none yet that `--passphrase-file` could hold.
    let first = passphrase.file.as_deref().filter(|_| !was_locked);
    let new = Source::new_one(args.new_passphrase_file.as_deref().or(first))?;
    home.set_passphrase(&identity, &signer, Some(&new))?;
    output.note(
        "The signer key is under the passphrase. Nothing restores it when that is forgotten.",
    );
    output.note("An agent that is running knows the key as it was until it is started again.");
    Ok(())
}

async fn run_join(home: &Home, join: cli::Join, output: Output) -> Result<()> {
    output::log_to_stderr("warn");
    let code = if join.code == "-" {
        let mut code = String::new();
        std::io::stdin().take(4096).read_to_string(&mut code)?;
        code
    } else {
        join.code
    };
    let label = join.label.unwrap_or_else(host_label);
    let joining = connect_agent::join(home, &code, read_ca(&join.ca)?, &label);
    let identity = output.wait("Joining the workspace", joining).await?;
    if identity.share_id().is_some() {
        // An agent that does not answer finds the share when it starts.
        let told = local::ask(home, &Ask::LookAtShares).await;
        tracing::debug!(told = told.is_ok(), "the agent was told of the share");
    }
    output.joined(&identity);
    Ok(())
}

/// Reads the file of `--ca`.
fn read_ca(ca: &cli::Ca) -> Result<Option<HubCa>> {
    let Some(path) = &ca.ca else {
        return Ok(None);
    };
    let wrong = |cause: &dyn std::fmt::Display| {
        Error::new(ErrorKind::Usage, format_args!("`--ca {}`: {cause}", path.display()))
    };
    let pem = fs::read(path).map_err(|error| wrong(&error))?;
    HubCa::from_pem(&pem).map(Some).map_err(|error| {
        let told = wrong(&error);
        error.hint.iter().fold(told, |told, hint| told.hint(hint))
    })
}

fn host_label() -> Label {
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    host.and_then(|name| name.parse().ok())
        .unwrap_or_else(|| "agent".parse().expect("a word is a label"))
}

async fn run_up(home: Home, up: cli::Up, output: Output) -> Result<()> {
    if let Some(label) = &up.label {
        home.set_label(label)?;
    }
    let lock = match attach_or_lock(&home, &Ask::Status).await? {
        Attached::Answer(_) if up.service => {
            return Err(Error::new(ErrorKind::Other, "another process is the agent of this home")
                .hint("`connect down` stops it"));
        }
        Attached::Answer(_) => {
            output.note("The agent is already running.");
            if up.label.is_some() {
                output.note("It has its new label when it is started again: `connect down`, then `connect up`.");
            }
            return Ok(());
        }
        Attached::Lock(lock) => lock,
    };
    if up.detach {
        drop(lock);
        return detach(&home, &up, output).await;
    }
    if up.service {
        output::log_to_home(&home, "info")?;
    } else {
        output::log_to_stderr("info");
    }
    let ran = async {
        let host = start(home, lock, up.run.encoding, up.rotate_after).await?;
        if up.service {
            daemon::notify("READY=1");
        }
        let served = serve(&host, output).await;
        host.stop().await;
        served
    };
    let ended = ran.await;
    if up.service
        && let Err(error) = &ended
    {
        let hint = error.hint.as_deref().unwrap_or_default();
        tracing::error!(%error, hint, "the agent ends");
    }
    ended
}

/// Starts the agent in a process of its own and waits until it answers.
async fn detach(home: &Home, up: &cli::Up, output: Output) -> Result<()> {
    // What is wrong with the home is said here, not in a log.
    home.load()?;
    let mut child = std::process::Command::new(std::env::current_exe()?)
        .args(["--json", "up", "--service", "--encoding", encoding_name(up.run.encoding)])
        .arg(format!("--rotate-after={}s", up.rotate_after.as_secs()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let log = agent_log::path(home);
    output
        .wait("Starting the agent", wait_for_agent(home, || has_ended(&mut child)))
        .await
        .map_err(|error| {
            if error.hint.is_some() {
                error
            } else {
                error.hint(format_args!("its log is `{}`", log.display()))
            }
        })?;
    output.note(format_args!(
        "The agent runs in the background; `connect logs` shows its log, {}",
        log.display()
    ));
    Ok(())
}

/// Waits until the agent of a home answers, unless it has ended.
pub(crate) async fn wait_for_agent(
    home: &Home,
    mut has_ended: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let started = async {
        loop {
            if let Some(Answer::Status(_)) = local::ask(home, &Ask::Status).await? {
                return Ok(());
            }
            if has_ended()? {
                return Err(Error::new(ErrorKind::Other, "the agent ended as soon as it started"));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    tokio::time::timeout(DETACH_TIMEOUT, started)
        .await
        .unwrap_or_else(|_| Err(Error::new(ErrorKind::Other, "the agent does not come up")))
}

/// An encoding as `--encoding` takes it.
pub(crate) fn encoding_name(encoding: Encoding) -> &'static str {
    match encoding {
        Encoding::Base64 => "base64",
        Encoding::Binary => "binary",
    }
}

/// Whether it ended; then what it said last is the error.
fn has_ended(child: &mut Child) -> Result<bool> {
    if child.try_wait()?.is_none() {
        return Ok(false);
    }
    let mut said = String::new();
    if let Some(stderr) = &mut child.stderr {
        stderr.take(MAX_SAID_BYTES).read_to_string(&mut said)?;
    }
    let said = said.lines().rev().find_map(|line| serde_json::from_str::<Error>(line).ok());
    match said {
        Some(mut error) => {
            error.message = format!("the agent ended: {error}");
            Err(error)
        }
        None => Ok(true),
    }
}

async fn run_down(home: &Home, output: Output) -> Result<()> {
    output.wait("Stopping the agent", stop(home)).await?;
    output.stopped();
    if daemon::is_installed(home) {
        output.note("It starts again with the system; `connect daemon uninstall` ends that.");
    }
    Ok(())
}

/// Stops the running agent; then the next one can start.
pub(crate) async fn stop(home: &Home) -> Result<()> {
    tell(home, &Ask::Down).await?;
    // Stopped means that the next agent can start.
    let free = async {
        loop {
            if let Some(lock) = home.try_lock()? {
                return Ok::<HomeLock, Error>(lock);
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    tokio::time::timeout(ATTACH_TIMEOUT, free).await.map_err(|_| {
        Error::new(ErrorKind::Other, "the agent was told to stop, but still runs")
            .hint("it may be ending connections: try it again in a moment")
    })??;
    Ok(())
}

async fn run_status(home: &Home, output: Output) -> Result<()> {
    let Answer::Status(status) = ask(home, &Ask::Status).await? else {
        return Err(misunderstood());
    };
    output.status(&status);
    if status.connected {
        return Ok(());
    }
    let hint = status.error.as_ref().and_then(|cause| cause.hint.as_deref());
    Err(Error::new(ErrorKind::HubUnreachable, "the agent is not connected to its hub")
        .hint(format_args!("it goes on trying; {}", hint.unwrap_or("is the hub up?"))))
}

/// Warnings are no failure; the first failure's kind is the exit code.
async fn run_doctor(home: &Home, output: Output) -> Result<()> {
    output::log_to_stderr("error");
    let findings = output.wait("Looking", connect_agent::examine(home)).await;
    output.examined(&findings);
    let failure = findings.iter().find_map(|finding| finding.code.map(|code| (code, finding)));
    match failure {
        None => Ok(()),
        Some((code, finding)) => Err(Error::new(
            code,
            format_args!("{}: {}", finding.title.to_lowercase(), finding.text),
        )),
    }
}

async fn run_verify(home: &Home, agent: Option<&str>, output: Output) -> Result<()> {
    output::log_to_stderr("warn");
    let words = workspace_words(&home.load()?.workspace_id()).join(" ");
    let verified = match agent {
        Some(agent) => {
            let verifying = async { Directory::open(home).await?.verify(agent).await };
            Some(output.wait("Asking the hub", verifying).await?)
        }
        None => None,
    };
    output.verify(&words, verified.as_ref());
    Ok(())
}

async fn run_rotate(home: &Home, output: Output) -> Result<()> {
    let rotated = match attach_or_lock(home, &Ask::Rotate).await? {
        Attached::Answer(answer) => {
            let Answer::Rotated(rotated) = *answer else {
                return Err(misunderstood());
            };
            rotated
        }
        Attached::Lock(lock) => {
            output::log_to_stderr("warn");
            connect_agent::rotate(home, &lock).await?
        }
    };
    output.rotated(&rotated);
    Ok(())
}

async fn run_expose(home: Home, expose: cli::Expose, output: Output) -> Result<()> {
    let target: connect_agent::Target = expose.target.parse()?;
    let name = expose.name;
    if let Some(name) = &name
        && (Cli::command().get_subcommands().any(|command| command.get_name() == name.as_str())
            || name.as_str() == "help")
    {
        return Err(Error::new(
            ErrorKind::Usage,
            format_args!(
                "`{name}` is a command of `connect`, so it cannot be the name of a service"
            ),
        )
        .hint("choose another `--name`"));
    }
    let target = target.to_string();
    let command = Ask::Expose {
        name: name.clone(),
        target: target.clone(),
        allow: expose.allow.clone(),
        take_over: expose.take_over,
    };
    let attached = output.wait("Telling the hub", attach_or_lock(&home, &command)).await?;
    let lock = match attached {
        Attached::Lock(lock) => lock,
        Attached::Answer(answer) => {
            let Answer::Exposed(exposed) = *answer else {
                return Err(misunderstood());
            };
            output.exposed(&exposed);
            return Ok(());
        }
    };
    output::log_to_stderr("warn");
    let host = start(home, lock, expose.run.encoding, Options::ROTATE_AFTER).await?;
    let expose_it = async || {
        let allow = expose.allow.clone();
        host.expose(name.clone(), &target, allow, expose.take_over, Keep::ThisRun).await
    };
    let named = OnceCell::new();
    let served = foreground(&host, output, expose_it, |exposed| {
        output.exposed(exposed);
        // Printed once, and so set once.
        let _ = named.set(exposed.name.clone());
    })
    .await;
    // Its own item ends with it. A hub that is away hears of it at the next start.
    if let Some(name) = named.get().or(name.as_ref())
        && let Ok(Err(error)) = tokio::time::timeout(RETRY, host.unexpose(name)).await
        && error.kind != ErrorKind::ServiceNotFound
    {
        tracing::warn!(%error, "the hub was not told that the service is withdrawn");
    }
    host.stop().await;
    served
}

async fn run_reach(home: Home, reach: cli::Reach, output: Output) -> Result<()> {
    if reach.check {
        return run_check(home, reach, output).await;
    }
    let cli::Reach { name, share, port, bind, accept_new, run, .. } = reach;
    let waiting = format!("Waiting for `{name}`");
    let reaching = Reaching { name, share, at: LocalEnd { port, address: bind }, accept_new };
    let command = Ask::Reach(reaching.clone());
    let lock = match output.wait(&waiting, attach_or_lock(&home, &command)).await? {
        Attached::Lock(lock) => lock,
        Attached::Answer(answer) => {
            let Answer::Reached(reached) = *answer else {
                return Err(misunderstood());
            };
            output.reached(&reached);
            return Ok(());
        }
    };
    output::log_to_stderr("warn");
    let host = start(home, lock, run.encoding, Options::ROTATE_AFTER).await?;
    let reach_it = async || host.reach(&reaching, Keep::ThisRun).await;
    let served = foreground(&host, output, reach_it, |reached| output.reached(reached)).await;
    host.stop().await;
    served
}

/// Checks a service, by the running agent or by one that lives as long as the check. Nothing is bound, and
/// nothing comes back at the next start.
async fn run_check(home: Home, reach: cli::Reach, output: Output) -> Result<()> {
    let cli::Reach { name, share, speed, run, .. } = reach;
    let command = Ask::Check { name: name.clone(), share: share.clone(), speed };
    let waiting = format!("Checking `{name}`");
    let checked = match output.wait(&waiting, attach_or_lock(&home, &command)).await? {
        Attached::Answer(answer) => {
            let Answer::Checked(checked) = *answer else {
                return Err(misunderstood());
            };
            checked
        }
        Attached::Lock(lock) => {
            output::log_to_stderr("error");
            let host = Host::start(home, lock, options(run.encoding)?).await?;
            let checking = host.check(&name, share.as_deref(), speed);
            let checked = output.wait(&waiting, checking).await;
            host.stop().await;
            checked?
        }
    };
    output.checked(&checked);
    if checked.ok {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::TargetUnreachable,
        format_args!("the target of `{}` does not answer its exposer", name),
    ))
}

/// Runs the agent for a command that became it: does what the command is for, trying again while the hub
/// or the exposer is away, prints the outcome, and serves until Ctrl-C.
async fn foreground<T>(
    host: &Arc<Host>,
    output: Output,
    command: impl AsyncFn() -> Result<T>,
    print: impl FnOnce(&T),
) -> Result<()> {
    let mut serving = std::pin::pin!(serve(host, output));
    let trying = async {
        let mut said = false;
        loop {
            match command().await {
                Err(error)
                    if matches!(
                        error.kind,
                        ErrorKind::HubUnreachable | ErrorKind::ExposerOffline
                    ) =>
                {
                    if !std::mem::replace(&mut said, true) {
                        output.note(format_args!("{error}; trying again until Ctrl-C"));
                    }
                    tokio::time::sleep(RETRY).await;
                }
                settled => return settled,
            }
        }
    };
    let done = tokio::select! {
        done = trying => done?,
        served = &mut serving => return served,
    };
    print(&done);
    output.note("Press Ctrl-C to stop.");
    output::flush();
    serving.await
}

/// What became of a command: an answer of the running agent, or the right to become it.
enum Attached {
    Answer(Box<Answer>),
    Lock(HomeLock),
}

/// Gives a command to the running agent, or takes the lock of a home that has none.
async fn attach_or_lock(home: &Home, command: &Ask) -> Result<Attached> {
    if !home.is_enrolled() {
        home.load()?;
    }
    let attached = async {
        loop {
            if let Some(answer) = local::ask(home, command).await? {
                return Ok(Attached::Answer(Box::new(answer)));
            }
            if let Some(lock) = home.try_lock()? {
                return Ok(Attached::Lock(lock));
            }
            // The lock is held, but there is no socket: its process is starting, or stopping.
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    // Answering may take long, so the time counts only while there is nobody to answer.
    let waiting = async {
        tokio::time::sleep(ATTACH_TIMEOUT).await;
        while tokio::net::UnixStream::connect(home.socket_path()?).await.is_ok() {
            tokio::time::sleep(ATTACH_TIMEOUT).await;
        }
        Err(Error::new(
            ErrorKind::NoAgent,
            format_args!("a process holds `{}` but does not answer", home.dir().display()),
        )
        .hint("stop it, and try again"))
    };
    tokio::select! {
        attached = attached => attached,
        timeout = waiting => timeout,
    }
}

pub(crate) async fn ask(home: &Home, command: &Ask) -> Result<Answer> {
    if !home.is_enrolled() {
        home.load()?;
    }
    local::ask(home, command).await?.ok_or_else(|| {
        Error::new(ErrorKind::NoAgent, "no agent is running here")
            .hint("start it: `connect up --detach`")
    })
}

async fn tell(home: &Home, command: &Ask) -> Result<()> {
    ask(home, command).await.map(|_| ())
}

fn misunderstood() -> Error {
    Error::new(ErrorKind::NoAgent, "the running agent gives another answer than was asked for")
        .hint("it may be of another version: `connect down`, then `connect up`")
}

/// Makes keys of tunnels live shorter, for tests: see `RekeyAfter`.
const REKEY_AFTER: &str = "CONNECT_REKEY_AFTER";
/// How often targets are looked at, in milliseconds, for tests: see `Options::HEALTH_EVERY`.
const HEALTH_EVERY: &str = "CONNECT_HEALTH_EVERY_MS";
/// More often than that nobody wants to know.
const LEAST_HEALTH_EVERY: Duration = Duration::from_millis(100);

async fn start(
    home: Home,
    lock: HomeLock,
    encoding: Encoding,
    rotate_after: Duration,
) -> Result<Arc<Host>> {
    raise_file_limit();
    Host::start(home, lock, Options { rotate_after, ..options(encoding)? }).await
}

/// How an agent runs that a command starts.
fn options(encoding: Encoding) -> Result<Options> {
    let encoding = match encoding {
        Encoding::Base64 => connect_spec::encoding::Encoding::Base64,
        Encoding::Binary => connect_spec::encoding::Encoding::Binary,
    };
    let rekey_after = match std::env::var(REKEY_AFTER) {
        Ok(text) => text.parse().map_err(|error| {
            Error::new(ErrorKind::Usage, format_args!("{REKEY_AFTER}: {error}"))
        })?,
        Err(_) => RekeyAfter::default(),
    };
    let health_every = match std::env::var(HEALTH_EVERY) {
        Ok(text) => text
            .parse()
            .map(|millis| Duration::from_millis(millis).max(LEAST_HEALTH_EVERY))
            .map_err(|error| {
                Error::new(ErrorKind::Usage, format_args!("{HEALTH_EVERY}: {error}"))
            })?,
        Err(_) => Options::HEALTH_EVERY,
    };
    Ok(Options { encoding, rekey_after, health_every, ..Options::default() })
}

/// A thousand connections are a thousand files, more than systems allow by default.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

/// Serves until a signal or `connect down`, and says what stops.
async fn serve(host: &Arc<Host>, output: Output) -> Result<()> {
    output::flush();
    let served = tokio::select! {
        served = host.serve() => served,
        () = stop_signal()? => Ok(()),
    };
    let status = host.status().await;
    let streams: usize = status.exposed.iter().map(|exposed| exposed.streams).sum::<usize>()
        + status.reached.iter().map(|reached| reached.streams).sum::<usize>();
    output.note(format_args!(
        "Stopping: {} exposed, {} reached, {streams} connections.",
        status.exposed.len(),
        status.reached.len()
    ));
    served
}

/// Waits for SIGINT, SIGTERM or SIGHUP.
fn stop_signal() -> Result<impl Future<Output = ()>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    })
}
