//! The command line, and nothing that acts on it.

use std::{path::PathBuf, time::Duration};

use clap::{Args, ColorChoice, Parser, Subcommand, ValueEnum};
use connect_agent::Loopback;
use connect_spec::{
    audit::ApiKeyId,
    ids::{CredentialId, Label, ServiceName},
    objects::is_tag,
};

/// Reach private services by name, end to end encrypted through a hub that cannot read them.
#[derive(Debug, Parser)]
#[command(name = "connect", version, max_term_width = 100, override_usage = USAGE, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// Print JSON on stdout.
    #[arg(long, global = true, help_heading = GLOBAL)]
    pub(crate) json: bool,
    /// Print results only.
    #[arg(long, short, global = true, help_heading = GLOBAL)]
    pub(crate) quiet: bool,
    /// Colours: `auto` has them on a terminal, unless NO_COLOR is set.
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "WHEN", default_value_t, hide_default_value = true)]
    pub(crate) color: ColorChoice,
    /// Read the passphrase of the signer key from the first line of this file; `-` is stdin.
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "FILE")]
    pub(crate) passphrase_file: Option<PathBuf>,
    /// What to do; without it, what this machine is and what one can do next.
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    /// The word that stood in place of a command: `connect prod-db` for `connect reach prod-db`.
    #[arg(skip)]
    pub(crate) short: Option<String>,
}

const USAGE: &str = "connect [OPTIONS] [COMMAND]
       connect HOST:PORT …             short for `connect expose HOST:PORT …`
       connect NAME …                  short for `connect reach NAME …`";

/// Options of every command, below its own.
const GLOBAL: &str = "Global options";

const EXAMPLES: &str = "\
Examples:
  connect init --hub http://127.0.0.1:7420      begin a workspace; prints an invite
  connect join pc1…                             join it on another machine
  connect expose localhost:5432 --name prod-db  offer a database
  connect reach prod-db                         use it: prints 127.0.0.1:5432
  connect reach prod-db --check                 is it well, and how far away?

Exit codes: 0 done, 1 other failure, 2 usage, 3 not enrolled, 4 hub unreachable,
5 service not found, 6 refused, 7 trust violation, 8 target unreachable,
9 no agent running, 10 exposer offline";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Begin a workspace at a hub; this machine becomes its first member and signer.
    Init(Init),
    /// Make a code by which another machine joins; prints the code alone.
    Invite(Invite),
    /// Join a workspace by a code, or become the guest of a share.
    Join(Join),
    /// Run the agent: connect, and restore what was exposed and reached.
    Up(Up),
    /// Stop the running agent.
    Down,
    /// Show the log of an agent that runs in the background.
    Logs(Logs),
    /// Have the agent started with the system, and again when it fails.
    #[command(subcommand)]
    Daemon(Daemon),
    /// Offer a service of this machine, or one that it can reach, to the workspace.
    Expose(Expose),
    /// Offer a service no longer.
    Unexpose {
        /// The service.
        name: ServiceName,
    },
    /// Reach a service on a local port; prints the address.
    Reach(Reach),
    /// Reach a service no longer.
    Unreach {
        /// The service.
        name: ServiceName,
    },
    /// List the services of the workspace.
    Services,
    /// List the agents of the workspace.
    Agents,
    /// Let somebody outside the workspace reach some services for a while; prints the code for it alone.
    Share(Share),
    /// List the shares of the workspace, and those that this home joined.
    Shares,
    /// End a share at once: its guests lose what they reach.
    Unshare {
        /// Its label or id.
        share: String,
    },
    /// Forget a share that this home joined.
    Leave {
        /// Its label or id.
        share: String,
    },
    /// Look after the workspace's trust log and the keys that sign it.
    #[command(subcommand)]
    Trust(Trust),
    /// Print words of the workspace, or with an agent digits, to compare with what others see.
    Verify {
        /// Label of an agent, or its id or the first 8 digits of it.
        agent: Option<String>,
    },
    /// List the invites that are open, or close one.
    Invites {
        /// Close the invite of this id: nobody joins by it any more; who joined stays.
        #[arg(long, value_name = "ID")]
        revoke: Option<CredentialId>,
    },
    /// End an agent: its tunnels are closed, and no member trusts it again.
    Revoke {
        /// Label of the agent, or its id or the first 8 digits of it.
        agent: String,
        /// Do not ask.
        #[arg(long, short)]
        yes: bool,
    },
    /// Make a new static key for this agent; connections go on.
    Rotate,
    /// Show how the running agent is doing; exits 0 only when it is connected.
    Status,
    /// Look for what keeps this agent from working, and say what to do about it.
    Doctor,
    /// Show what happened in the workspace, as the hub recorded it.
    Audit(Audit),
    /// Print what completes command lines in a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Manage the keys with which programs read the workspace at the hub over HTTP.
    #[command(subcommand)]
    ApiKey(ApiKey),
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Audit {
    /// Leave out what is older: `30m`, `1h`, `7d`.
    #[arg(long, value_parser = duration)]
    pub(crate) since: Option<Duration>,
    /// Go on with what happens from now on, until Ctrl-C.
    #[arg(long, short)]
    pub(crate) follow: bool,
    #[command(subcommand)]
    pub(crate) command: Option<AuditCommand>,
}

#[derive(Debug, Clone, Copy, Subcommand)]
pub(crate) enum AuditCommand {
    /// Read the whole log and check that no row was changed, removed or put elsewhere; exits 7 otherwise.
    Verify,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ApiKey {
    /// Make a key and print it; it is shown this once.
    Create {
        /// What it may do; repeatable.
        #[arg(long = "scope", value_enum, default_value = "read")]
        scopes: Vec<Scope>,
        /// How long it is valid: `12h`, `30d`, up to `366d`.
        #[arg(long, default_value = "90d", value_parser = long_duration)]
        expires: Duration,
    },
    /// List the keys.
    List,
    /// End a key.
    Revoke {
        /// Its id, as `list` shows it.
        id: ApiKeyId,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scope {
    /// List services, agents, tunnels and shares, as opaque ids with their sealed records.
    Read,
    /// Read the audit log.
    Audit,
    /// Cut tunnels.
    Write,
}

#[derive(Debug, Args)]
pub(crate) struct Init {
    /// The hub, as `connect-hub serve` printed it: `https://host:port#sha256=…`.
    #[arg(long, env = "CONNECT_HUB")]
    pub(crate) hub: String,
    /// What people call this agent [default: the host's name].
    #[arg(long, alias = "name")]
    pub(crate) label: Option<Label>,
    /// Token of the hub's operator; better given by the environment.
    #[arg(long, env = "CONNECT_REGISTRATION_TOKEN", hide_env_values = true)]
    pub(crate) registration_token: Option<String>,
    #[command(flatten)]
    pub(crate) ca: Ca,
}

#[derive(Debug, Args)]
pub(crate) struct Ca {
    /// Certificates in PEM of who signs the hub's certificate, in place of the system's authorities; kept
    /// in the home.
    #[arg(long, env = "CONNECT_CA", value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Invite {
    /// How long the code can be used: `30m`, `1h`, `7d`.
    #[arg(long, default_value = "1h", value_parser = duration)]
    pub(crate) expires: Duration,
    /// How many machines may join by it.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) uses: u32,
    /// Tag of whoever joins, for `connect expose --allow`; repeatable.
    #[arg(long = "tag")]
    pub(crate) tags: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Share {
    /// The services.
    #[arg(required = true, num_args = 1..=16)]
    pub(crate) services: Vec<ServiceName>,
    /// How long it counts, from joining to reaching: `12h`, `7d`, up to `90d`.
    #[arg(long, default_value = "7d", value_parser = duration)]
    pub(crate) expires: Duration,
    /// What it is called, here and by its guest [default: the first service].
    #[arg(long)]
    pub(crate) name: Option<Label>,
    /// How many machines may join by it.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) uses: u32,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Trust {
    /// Show who signed what, and when.
    Log,
    /// Let an agent sign: revoke, invite and close invites; an owner also names signers.
    AddSigner {
        /// Label of the agent, or its id or the first 8 digits of it.
        agent: String,
        /// What it may do.
        #[arg(long, value_enum, default_value_t)]
        role: Signer,
    },
    /// Let an agent sign no longer; it stays a member, and so does whom it admitted.
    RemoveSigner {
        /// Label of the agent, or its id or the first 8 digits of it.
        agent: String,
    },
    /// Give an agent another role: what it had before ends.
    Role {
        /// Label of the agent, or its id or the first 8 digits of it.
        agent: String,
        /// What it may do.
        #[arg(value_enum)]
        role: Role,
    },
    /// Set what the workspace demands: strict refuses new tunnels when news may have been held back.
    Policy {
        /// The policy.
        #[arg(value_enum)]
        policy: PolicyName,
    },
    /// Settle a fork of the trust log for the branch that this agent follows.
    Settle,
    /// Make this agent the only signer by the 24 recovery words, which are read from stdin.
    Recover,
    /// Put the signer key of this home under a passphrase, or under another one.
    Passphrase(Passphrase),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Signer {
    /// Invites, revokes and closes invites.
    #[default]
    Admin,
    /// Everything.
    Owner,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// Reaches and exposes.
    Member,
    /// Reaches only.
    Reacher,
    /// Exposes only.
    Exposer,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PolicyName {
    /// Refuse new tunnels without a fresh beat, in a fork, and to a name that changed hands.
    Strict,
    /// Warn, and go on.
    Relaxed,
}

#[derive(Debug, Args)]
pub(crate) struct Passphrase {
    /// Take the passphrase away.
    #[arg(long, conflicts_with = "new_passphrase_file")]
    pub(crate) remove: bool,
    /// Read the new passphrase from the first line of this file; `-` is stdin [default: ask; for the
    /// first one also `--passphrase-file`].
    #[arg(long, value_name = "FILE")]
    pub(crate) new_passphrase_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Join {
    /// The code, `pc1…`; `-` reads it from stdin.
    #[arg(env = "CONNECT_INVITE", hide_env_values = true)]
    pub(crate) code: String,
    /// What people call this agent [default: the host's name].
    #[arg(long)]
    pub(crate) label: Option<Label>,
    #[command(flatten)]
    pub(crate) ca: Ca,
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    /// What people call this agent, from now on.
    #[arg(long)]
    pub(crate) label: Option<Label>,
    /// Go on in the background; logs to `agent.log` in the home.
    #[arg(long)]
    pub(crate) detach: bool,
    /// Run for a service manager: log to `agent.log` in the home, tell systemd when the agent is up.
    #[arg(long, conflicts_with = "detach")]
    pub(crate) service: bool,
    /// Age at which the agent makes a new static key: `1h` to `90d`.
    #[arg(long, default_value = "30d", value_parser = rotation)]
    pub(crate) rotate_after: Duration,
    #[command(flatten)]
    pub(crate) run: Run,
}

#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Go on with what is added, until Ctrl-C.
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// How many lines of the end.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 100)]
    pub(crate) lines: usize,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Daemon {
    /// Install the agent of this home as a service, or bring it up to date, and start it.
    Install(DaemonInstall),
    /// Stop the service of this home and remove it.
    Uninstall,
    /// Say whether the service of this home runs; exits 0 only when it does.
    Status,
    /// Show its log.
    Logs(Logs),
}

#[derive(Debug, Args)]
pub(crate) struct DaemonInstall {
    /// As a service of the whole system, which needs root. It runs as the owner of the home, which is that of
    /// CONNECT_HOME, else root's `~/.connect` [default: a service of this user].
    #[arg(long)]
    pub(crate) system: bool,
    #[command(flatten)]
    pub(crate) run: Run,
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    /// How packets travel through the hub, for an agent that this command starts.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) encoding: Encoding,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Encoding {
    /// As text, which every proxy lets through.
    #[default]
    Base64,
    /// As they are.
    Binary,
}

#[derive(Debug, Args)]
pub(crate) struct Expose {
    /// Where connections go: `host:port`, or a port of this machine.
    pub(crate) target: String,
    /// The name by which others reach it [default: what it speaks, such as `postgres`].
    #[arg(long)]
    pub(crate) name: Option<ServiceName>,
    /// Tag or agent id that may reach it; repeatable [default: every member].
    #[arg(long = "allow", value_name = "TAG|AGENT_ID", value_parser = allowed)]
    pub(crate) allow: Vec<String>,
    /// Take the name from another agent that has it but is offline.
    #[arg(long)]
    pub(crate) take_over: bool,
    #[command(flatten)]
    pub(crate) run: Run,
}

#[derive(Debug, Args)]
pub(crate) struct Reach {
    /// The service.
    pub(crate) name: ServiceName,
    /// Local port [default: the one of last time, else the service's own, else a free one].
    #[arg(long)]
    pub(crate) port: Option<u16>,
    /// Reach it by this share that this home joined [default: the own workspace first].
    #[arg(long, value_name = "LABEL")]
    pub(crate) share: Option<String>,
    /// Local address, 127.x.y.z or ::1: with one each, several services can have the same port [default:
    /// the one of last time, else 127.0.0.1].
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) bind: Option<Loopback>,
    /// Take it as it is that another agent exposes the name than when it was last reached.
    #[arg(long)]
    pub(crate) accept_new: bool,
    /// Bind no port: have the exposer look at its target, measure the way there, and say what was found.
    #[arg(long, conflicts_with_all = ["port", "accept_new"])]
    pub(crate) check: bool,
    /// With `--check`: also measure how fast bytes travel, for a few seconds.
    #[arg(long, requires = "check")]
    pub(crate) speed: bool,
    #[command(flatten)]
    pub(crate) run: Run,
}

/// The longest that an API key is valid.
const MAX_API_KEY_AGE: Duration = Duration::from_secs(366 * 24 * 3600);

fn duration(text: &str) -> Result<Duration, String> {
    bounded(text, connect_spec::limits::MAX_CERTS)
}

fn long_duration(text: &str) -> Result<Duration, String> {
    bounded(text, MAX_API_KEY_AGE)
}

fn bounded(text: &str, longest: Duration) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a time such as `30m`, `1h` or `7d`");
    let unit = text.chars().next_back().ok_or_else(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 24 * 3600,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    match number.checked_mul(seconds).map(Duration::from_secs) {
        Some(time) if !time.is_zero() && time <= longest => Ok(time),
        _ => {
            let days = longest.as_secs() / (24 * 3600);
            Err(format!("the time must be between 1 second and {days} days"))
        }
    }
}

/// What cannot be a tag or an id admits nobody, which is not what was meant.
fn allowed(text: &str) -> Result<String, String> {
    if is_tag(text) {
        return Ok(text.to_owned());
    }
    Err("a tag has 1 to 32 of a-z, 0-9 and `-`, an id 32 hex digits".to_owned())
}

fn rotation(text: &str) -> Result<Duration, String> {
    // Whoever looked a service up must have time to use what was found.
    let time = duration(text)?;
    if time < Duration::from_secs(3600) {
        return Err("the time must be at least 1 hour".to_owned());
    }
    Ok(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit_and_bounds() {
        assert_eq!(duration("30m"), Ok(Duration::from_secs(1800)));
        assert_eq!(duration("1h"), Ok(Duration::from_secs(3600)));
        assert_eq!(duration("90d"), Ok(Duration::from_secs(90 * 24 * 3600)));
        for bad in ["", "h", "0s", "91d", "5", "5x", "-1h", "1.5h", "99999999999999999999d", "5é"]
        {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_no_agent_can_be_called_by_is_not_allowed() {
        for good in ["dba", "team-7", "0123456789abcdef0123456789abcdef"] {
            assert_eq!(allowed(good).as_deref(), Ok(good));
        }
        for bad in ["", "DBA", "a b", "é", "0123456789abcdef0123456789abcdef0"] {
            assert!(allowed(bad).is_err(), "{bad}");
        }
    }
}
