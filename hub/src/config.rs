//! The command line, its environment variables, and what they come to.

use std::{
    collections::BTreeSet,
    env,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use connect_spec::limits::MIN_AUDIT_RETENTION;
use http::Uri;
use ipnet::IpNet;
use nix::unistd::Uid;
use sqlx::postgres::{PgConnectOptions, PgSslMode};

use crate::{
    auth::{Authorities, is_loopback_name},
    forwarded::{TrustedProxies, parse_network},
};

/// The relay of Private Connect ZK: it finds peers, isolates workspaces and forwards ciphertext.
#[derive(Debug, Parser)]
#[command(name = "connect-hub", version)]
pub struct Cli {
    /// What the log on stderr shows: error, warn, info, debug, trace, or directives of each module
    #[arg(
        long,
        env = "CONNECT_HUB_LOG",
        default_value = "info",
        global = true,
        value_name = "FILTER"
    )]
    pub log: String,
    /// How the log is written
    #[arg(
        long,
        env = "CONNECT_HUB_LOG_FORMAT",
        default_value = "text",
        global = true,
        value_name = "FORMAT"
    )]
    pub log_format: LogFormat,
    /// File in TOML with these options by their long names, `_` for `-`; options and environment come first
    #[arg(long, env = "CONNECT_HUB_CONFIG", global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// How the log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// A line for people.
    Text,
    /// A JSON object on each line.
    Json,
}

/// The subcommands.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Run the hub; with no --database-url it runs a private PostgreSQL of its own
    Serve(ServeArgs),
    /// Print the options of `serve` as a configuration file, with where each comes from
    Config(ServeArgs),
    /// Create or update the schema and its roles, as the owner of the database
    Migrate(DatabaseArgs),
    /// Manage who may create workspaces
    #[command(subcommand)]
    RegistrationToken(TokenCommand),
    /// Write every row of the database to a file, as the owner of the database
    Backup {
        /// Where to; replaced only by a whole backup
        file: PathBuf,
        /// Where the hub's database is.
        #[command(flatten)]
        database: DatabaseArgs,
    },
    /// Fill an empty database from a backup, as the owner of the database
    Restore {
        /// The backup
        file: PathBuf,
        /// Delete what the database holds
        #[arg(long)]
        replace: bool,
        /// Where the hub's database is.
        #[command(flatten)]
        database: DatabaseArgs,
    },
    /// Check that the database keeps workspaces apart, and print the SQL that mends what does not
    ///
    /// Exit code 0 when all is well and 1 when there is something to mend.
    Doctor {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
        /// Where the hub's database is.
        #[command(flatten)]
        database: DatabaseArgs,
    },
}

/// What can be done with registration tokens.
#[derive(Debug, Clone, Subcommand)]
pub enum TokenCommand {
    /// Make a token that creates one workspace, and print it
    Create {
        /// How long it is valid: a number with s, m, h or d
        #[arg(long, default_value = "24h", value_parser = parse_lifetime, value_name = "TIME")]
        expires: Duration,
        /// Where the hub's database is.
        #[command(flatten)]
        database: DatabaseArgs,
    },
}

/// Where the hub keeps its data.
#[derive(Debug, Clone, Args)]
pub struct DatabaseArgs {
    /// Directory of the private database and the hub's own key
    /// [default: /var/lib/connect-hub as root, else $XDG_DATA_HOME/connect-hub]
    #[arg(long, env = "CONNECT_HUB_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Use this PostgreSQL instead of a private one (TLS is verified unless the URL says otherwise)
    #[arg(long, env = "CONNECT_HUB_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: Option<DatabaseUrl>,
}

/// The options of `serve`.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Address for agents
    #[arg(
        long,
        env = "CONNECT_HUB_LISTEN",
        default_value = "127.0.0.1:7420",
        value_name = "ADDRESS"
    )]
    pub listen: SocketAddr,
    /// Address for health checks
    #[arg(
        long,
        env = "CONNECT_HUB_ADMIN_LISTEN",
        default_value = "127.0.0.1:7421",
        value_name = "ADDRESS"
    )]
    pub admin_listen: SocketAddr,
    /// Where the hub's database is.
    #[command(flatten)]
    pub database: DatabaseArgs,
    /// Certificate chain in PEM; without it the hub makes its own when it listens off loopback
    #[arg(long, env = "CONNECT_HUB_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Private key in PEM
    #[arg(long, env = "CONNECT_HUB_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// A URL under which agents dial this hub, the first one for `init`; repeatable, required off loopback
    #[arg(
        long = "public-url",
        env = "CONNECT_HUB_PUBLIC_URL",
        value_delimiter = ',',
        value_name = "URL"
    )]
    pub public_urls: Vec<PublicUrl>,
    /// A proxy whose X-Forwarded-For is believed: an address or a network; repeatable
    #[arg(
        long = "trusted-proxy",
        env = "CONNECT_HUB_TRUSTED_PROXY",
        value_delimiter = ',',
        value_parser = parse_network,
        value_name = "CIDR"
    )]
    pub trusted_proxies: Vec<IpNet>,
    /// Who may create a workspace [default: open on loopback, else token]
    #[arg(long, env = "CONNECT_HUB_REGISTRATION", value_name = "WHO")]
    pub registration: Option<Registration>,
    /// How long to serve on after SIGTERM while /readyz fails, so that a load balancer sends nobody new
    #[arg(
        long,
        env = "CONNECT_HUB_DRAIN",
        default_value = "0s",
        value_parser = parse_duration,
        value_name = "TIME"
    )]
    pub drain: Duration,
    /// How long rows of the audit logs are kept: `forever`, or at least 30d
    #[arg(
        long,
        env = "CONNECT_HUB_AUDIT_RETENTION",
        default_value = "forever",
        value_name = "TIME"
    )]
    pub audit_retention: Retention,
}

/// How long something is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retention {
    /// Until somebody removes it by hand.
    Forever,
    /// For this long.
    For(Duration),
}

impl FromStr for Retention {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "forever" {
            return Ok(Self::Forever);
        }
        let time = parse_duration(text)?;
        if time < MIN_AUDIT_RETENTION {
            return Err("must be `forever` or at least 30d".to_owned());
        }
        Ok(Self::For(time))
    }
}

/// Who may create a workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Registration {
    /// Everybody who can reach the hub.
    Open,
    /// Bearers of a registration token.
    Token,
}

/// A call that cannot be served, with what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct UsageError {
    /// What is wrong.
    pub message: String,
    /// What would be right.
    pub hint: String,
}

impl UsageError {
    fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into() }
    }
}

/// A PostgreSQL URL. It may hold a password, so it prints as nothing.
#[derive(Clone)]
pub struct DatabaseUrl(Box<PgConnectOptions>);

impl DatabaseUrl {
    /// How to connect.
    #[must_use]
    pub fn connect_options(&self) -> PgConnectOptions {
        PgConnectOptions::clone(&self.0)
    }
}

impl std::fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DatabaseUrl(..)")
    }
}

impl FromStr for DatabaseUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        use sqlx::ConnectOptions as _;
        // The parser's own message may repeat the URL.
        let options: PgConnectOptions =
            text.parse().map_err(|_| "not a PostgreSQL URL".to_owned())?;
        let says_tls = text.contains("sslmode=")
            || text.contains("ssl-mode=")
            || env::var_os("PGSSLMODE").is_some();
        let is_local = options.get_socket().is_some() || options.get_host().starts_with('/');
        let options =
            if says_tls || is_local { options } else { options.ssl_mode(PgSslMode::VerifyFull) };
        let options = options.application_name("connect-hub").disable_statement_logging();
        Ok(Self(Box::new(options)))
    }
}

/// A URL under which agents dial the hub: scheme, host, port, nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicUrl {
    is_https: bool,
    host: String,
    port: Option<u16>,
}

impl FromStr for PublicUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || "expected https://HOST or https://HOST:PORT".to_owned();
        let uri: Uri = text.trim_end_matches('/').parse().map_err(|_| wrong())?;
        let is_https = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            Some(_) | None => return Err(wrong()),
        };
        let authority = uri.authority().ok_or_else(wrong)?;
        if uri.path() != "/" || uri.query().is_some() || authority.as_str().contains('@') {
            return Err(wrong());
        }
        let host = authority.host().to_ascii_lowercase();
        if !is_https && !is_loopback_name(&host) {
            return Err("agents speak plain http:// to loopback only: use https://".to_owned());
        }
        Ok(Self { is_https, host, port: authority.port_u16() })
    }
}

impl std::fmt::Display for PublicUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = if self.is_https { "https" } else { "http" };
        write!(f, "{scheme}://{}", self.host)?;
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl PublicUrl {
    /// The spellings of its authority.
    fn authorities(&self) -> Vec<String> {
        let default = if self.is_https { 443 } else { 80 };
        let port = self.port.unwrap_or(default);
        let mut spellings = vec![format!("{}:{port}", self.host)];
        if port == default {
            spellings.push(self.host.clone());
        }
        spellings
    }
}

/// Where TLS comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TlsSource {
    /// Plain text: loopback.
    None,
    /// The operator's files.
    Files {
        /// The chain.
        cert_path: PathBuf,
        /// The key.
        key_path: PathBuf,
    },
    /// A key of our own, made for these names.
    SelfSigned(Vec<String>),
}

/// Where the database is.
#[derive(Debug, Clone)]
pub enum Database {
    /// The private cluster under the data directory.
    Private,
    /// Somebody else's server.
    Url(DatabaseUrl),
}

/// What `serve` does.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Address for agents.
    pub listen: SocketAddr,
    /// Address for health checks.
    pub admin_listen: SocketAddr,
    /// The hub's directory.
    pub data_dir: PathBuf,
    /// Where the database is.
    pub database: Database,
    /// Where TLS comes from.
    pub tls: TlsSource,
    /// Under which names the hub is dialled.
    pub public_urls: Vec<PublicUrl>,
    /// Whose word about the addresses of others counts.
    pub trusted_proxies: TrustedProxies,
    /// Who may create a workspace.
    pub registration: Registration,
    /// How long `/readyz` fails before agents are told to go.
    pub drain: Duration,
    /// How long rows of the audit logs are kept.
    pub audit_retention: Retention,
}

impl DatabaseArgs {
    /// Where the database is.
    #[must_use]
    pub fn database(&self) -> Database {
        self.database_url.clone().map_or(Database::Private, Database::Url)
    }

    /// The hub's directory, given or the default one.
    ///
    /// # Errors
    /// [`UsageError`] when there is no default.
    pub fn data_dir(&self) -> Result<PathBuf, UsageError> {
        if let Some(dir) = &self.data_dir {
            return Ok(dir.clone());
        }
        if Uid::effective().is_root() {
            return Ok(PathBuf::from("/var/lib/connect-hub"));
        }
        let absolute =
            |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        absolute("XDG_DATA_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
            .map(|dir| dir.join("connect-hub"))
            .ok_or_else(|| {
                UsageError::new(
                    "no place for the hub's data: HOME is not set",
                    "use --data-dir DIR",
                )
            })
    }
}

impl ServeArgs {
    /// Checks the options against each other.
    ///
    /// # Errors
    /// [`UsageError`].
    pub fn resolve(self) -> Result<ServeConfig, UsageError> {
        let on_loopback = self.listen.ip().is_loopback();
        if !on_loopback && self.public_urls.is_empty() {
            return Err(UsageError::new(
                format!("listening on {} needs --public-url", self.listen),
                format!(
                    "add the URL that agents dial, such as --public-url https://HOST:{}",
                    self.listen.port()
                ),
            ));
        }
        // A proxy on this machine makes a hub on loopback as public as any.
        let is_public =
            !on_loopback || self.public_urls.iter().any(|url| !is_loopback_name(&url.host));
        let registration = match self.registration {
            Some(Registration::Open) if is_public => {
                return Err(UsageError::new(
                    "--registration open would let everybody create workspaces",
                    "leave it out, and make tokens with `connect-hub registration-token create`",
                ));
            }
            Some(registration) => registration,
            None if is_public => Registration::Token,
            None => Registration::Open,
        };
        let tls = match (self.tls_cert, self.tls_key) {
            (Some(cert_path), Some(key_path)) => TlsSource::Files { cert_path, key_path },
            (Some(_), None) => {
                return Err(UsageError::new(
                    "--tls-cert goes with --tls-key",
                    "name the file with the private key, too",
                ));
            }
            (None, Some(_)) => {
                return Err(UsageError::new(
                    "--tls-key goes with --tls-cert",
                    "name the file with the certificate, too",
                ));
            }
            (None, None) if on_loopback => TlsSource::None,
            (None, None) => TlsSource::SelfSigned(
                self.public_urls
                    .iter()
                    .map(|url| url.host.trim_start_matches('[').trim_end_matches(']').to_owned())
                    .collect(),
            ),
        };
        if tls != TlsSource::None
            && let Some(url) = self.public_urls.iter().find(|url| !url.is_https)
        {
            return Err(UsageError::new(
                format!("{url} is plain text, and the hub speaks TLS"),
                "write https:// in --public-url",
            ));
        }
        Ok(ServeConfig {
            listen: self.listen,
            admin_listen: self.admin_listen,
            data_dir: self.database.data_dir()?,
            database: self.database.database(),
            tls,
            public_urls: self.public_urls,
            trusted_proxies: TrustedProxies(self.trusted_proxies),
            registration,
            drain: self.drain,
            audit_retention: self.audit_retention,
        })
    }
}

impl ServeConfig {
    /// The names that the hub answers to, listening on `bound`.
    #[must_use]
    pub fn authorities(&self, bound: SocketAddr) -> Authorities {
        let names: BTreeSet<String> =
            self.public_urls.iter().flat_map(PublicUrl::authorities).collect();
        Authorities::new(names, bound.ip().is_loopback())
    }

    /// The URL for `connect init`, with the certificate's pin if there is one.
    #[must_use]
    pub fn init_url(&self, bound: SocketAddr, pin: Option<&[u8; 32]>) -> String {
        let url = match (self.public_urls.first(), &self.tls) {
            (Some(url), _) => url.to_string(),
            (None, TlsSource::None) => format!("http://{bound}"),
            (None, TlsSource::Files { .. } | TlsSource::SelfSigned(_)) => {
                format!("https://{bound}")
            }
        };
        match pin {
            Some(pin) => format!("{url}#sha256={}", hex::encode(pin)),
            None => url,
        }
    }

    /// The value of a setting that was not given and follows from others, by its name in the file.
    #[must_use]
    pub fn computed(&self, key: &str) -> Option<String> {
        match key {
            "data_dir" if self.uses_data_dir() => Some(self.data_dir.display().to_string()),
            "registration" => {
                self.registration.to_possible_value().map(|value| value.get_name().to_owned())
            }
            _ => None,
        }
    }

    /// Whether the data directory holds anything.
    #[must_use]
    pub fn uses_data_dir(&self) -> bool {
        matches!(self.database, Database::Private) || matches!(self.tls, TlsSource::SelfSigned(_))
    }

    /// The hub's directory.
    #[must_use]
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }
}

/// Reads `90s`, `15m`, `24h` or `7d`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || "expected a number with s, m, h or d, such as 24h".to_owned();
    let split = text
        .len()
        .checked_sub(1)
        .filter(|split| text.is_char_boundary(*split))
        .ok_or_else(wrong)?;
    let (number, unit) = text.split_at(split);
    let unit: u64 = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return Err(wrong()),
    };
    let number: u32 = number.parse().map_err(|_| wrong())?;
    Ok(Duration::from_secs(u64::from(number) * unit))
}

/// As [`parse_duration`], of something that lives.
fn parse_lifetime(text: &str) -> Result<Duration, String> {
    let lifetime = parse_duration(text)?;
    if lifetime.is_zero() { Err("must be more than nothing".to_owned()) } else { Ok(lifetime) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(args: &[&str]) -> Result<ServeConfig, String> {
        let all = ["connect-hub", "serve", "--data-dir", "/tmp/hub"].iter().chain(args);
        let cli = Cli::try_parse_from(all).map_err(|error| error.to_string())?;
        let Command::Serve(serve) = cli.command else {
            return Err("another command".to_owned());
        };
        serve.resolve().map_err(|error| error.to_string())
    }

    #[track_caller]
    fn check_refused(args: &[&str], why: &str) {
        let error = resolve(args).unwrap_err();
        assert!(error.contains(why), "{error}");
    }

    #[test]
    fn loopback_is_plain_and_open() {
        let config = resolve(&[]).unwrap();
        assert_eq!(config.tls, TlsSource::None);
        assert_eq!(config.registration, Registration::Open);
        assert_eq!(
            config.init_url("127.0.0.1:7420".parse().unwrap(), None),
            "http://127.0.0.1:7420"
        );
    }

    #[test]
    fn off_loopback_there_is_tls_and_a_token() {
        check_refused(&["--listen", "0.0.0.0:7420"], "--public-url");
        let public = ["--listen", "0.0.0.0:7420", "--public-url", "https://hub.example:7420/"];
        let config = resolve(&public).unwrap();
        assert_eq!(config.tls, TlsSource::SelfSigned(vec!["hub.example".to_owned()]));
        assert_eq!(config.registration, Registration::Token);
        let url = config.init_url("0.0.0.0:7420".parse().unwrap(), Some(&[0xab; 32]));
        assert_eq!(url, format!("https://hub.example:7420#sha256={}", "ab".repeat(32)));
        check_refused(&[public.as_slice(), &["--registration", "open"]].concat(), "everybody");
    }

    #[test]
    fn a_proxy_makes_loopback_public() {
        let config = resolve(&["--public-url", "https://hub.example"]).unwrap();
        assert_eq!(config.registration, Registration::Token);
        check_refused(
            &["--public-url", "https://hub.example", "--registration", "open"],
            "everybody",
        );
    }

    #[test]
    fn urls_that_agents_would_refuse_are_refused_here() {
        check_refused(&["--public-url", "http://hub.example"], "use https://");
        check_refused(&["--public-url", "hub.example"], "expected https://");
        check_refused(&["--public-url", "https://hub.example/path"], "expected https://");
        check_refused(&["--public-url", "https://user@hub.example"], "expected https://");
        check_refused(&["--tls-cert", "c"], "--tls-key");
        let plain = ["--tls-cert", "c", "--tls-key", "k", "--public-url", "http://localhost:1"];
        check_refused(&plain, "plain text");
    }

    #[test]
    fn the_database_password_is_not_shown() {
        let url: DatabaseUrl = "postgres://u:hunter2@db.example/x".parse().unwrap();
        assert_eq!(format!("{url:?}"), "DatabaseUrl(..)");
        let wrong =
            "postgres://u:hunter2@db.example:notaport/x".parse::<DatabaseUrl>().unwrap_err();
        assert!(!wrong.contains("hunter2"));
    }

    #[test]
    fn tls_to_the_database_is_verified_when_the_url_is_silent() {
        for (url, mode) in [
            ("postgres://u@db.example/x", "VerifyFull"),
            ("postgres://u@db.example/x?sslmode=disable", "Disable"),
            ("postgres://u@db.example/x?sslmode=require", "Require"),
            ("postgres:///x?host=/run/postgresql", "Prefer"),
        ] {
            let url: DatabaseUrl = url.parse().unwrap();
            assert_eq!(format!("{:?}", url.0.get_ssl_mode()), mode);
        }
    }

    #[test]
    fn audit_logs_are_kept_for_a_month_at_least() {
        assert_eq!("forever".parse(), Ok(Retention::Forever));
        assert_eq!("400d".parse(), Ok(Retention::For(Duration::from_secs(400 * 86_400))));
        for wrong in ["29d", "0s", "", "always"] {
            assert!(wrong.parse::<Retention>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(parse_duration("24h"), Ok(Duration::from_secs(86_400)));
        assert_eq!(parse_duration("7d"), Ok(Duration::from_secs(7 * 86_400)));
        assert_eq!(parse_duration("0s"), Ok(Duration::ZERO));
        assert!(parse_lifetime("0s").is_err());
        for wrong in ["", "h", "24", "-1h", "1.5h", "1ü"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }
}
