//! The hub: finds the peer, isolates workspaces, forwards ciphertext.
//!
//! It holds no key that opens, alters or forges anything: `connect-crypto` and what it is built on are
//! not among its dependencies, and a test says so. What it can verify, it verifies as a second lock.
//!
//! Start reading at [`router`] (who is online, which tunnels there are; no IO), then [`relay`] (the data
//! plane), [`control`] and [`auth`] (one control socket), [`log`] and [`effects`] (the trust log, and what
//! becomes of those it ends), [`store`] and [`cluster`] (what it remembers).
//! [`server`] and [`routes`] are the HTTP below them. Deliberately absent: anything that decodes a
//! data frame, any state of a tunnel in the database, and any way to see two workspaces at once.

pub mod api_keys;
pub mod audit;
pub mod auth;
pub mod backup;
pub mod beats;
pub mod bucket;
pub mod cluster;
pub mod config;
pub mod config_file;
pub mod control;
pub mod doorman;
pub mod effects;
pub mod forwarded;
pub mod hub;
pub mod limits;
pub mod log;
pub mod metrics;
pub mod problem;
pub mod relay;
pub mod requests;
pub mod rest;
pub mod router;
pub mod routes;
pub mod server;
pub mod store;
pub mod tls;
pub mod trust;
pub mod tunnel;
pub mod wraps;

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use connect_spec::control::RegistrationToken;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use sqlx::{Connection as _, postgres::PgConnectOptions};
use tokio::{
    net::TcpListener,
    task::JoinSet,
    time::{Instant, sleep_until},
};

use crate::{
    backup::{BackupError, Rows},
    cluster::{Cluster, ClusterError, DataDir},
    config::{Database, DatabaseArgs, ServeConfig, TlsSource, UsageError},
    hub::{Hub, Phase},
    server::{Server, Service},
    store::{
        APP_ROLE, Store, StoreError,
        catalog::{self, Report},
    },
    tls::{Tls, TlsError},
};

/// The role that owns the private cluster.
const OWNER_ROLE: &str = "postgres";

/// Why the program ends with an error.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The call was wrong.
    #[error(transparent)]
    Usage(#[from] UsageError),
    /// The private database does not run.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The store is not usable.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no backup, or none that can be restored.
    #[error(transparent)]
    Backup(#[from] BackupError),
    /// There is no TLS.
    #[error("TLS")]
    Tls(#[from] TlsError),
    /// An address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// Which one.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// No private database was made there.
    #[error("there is no database in `{}`", .0.display())]
    NoDatabase(PathBuf),
    /// The operating system gives no random bytes.
    #[error("the operating system gives no random bytes")]
    NoRandomness,
}

impl HubError {
    /// What a person can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Usage(error) => Some(error.hint.clone()),
            Self::Cluster(error) => error.hint(),
            Self::Store(error) => error.hint().map(str::to_owned),
            Self::Backup(error) => error.hint(),
            Self::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse => Some(
                "another program has it: stop that, or choose with --listen and --admin-listen"
                    .to_owned(),
            ),
            Self::NoDatabase(_) => {
                Some("name the hub's --data-dir, or its --database-url".to_owned())
            }
            Self::Tls(_) | Self::Listen { .. } | Self::NoRandomness => None,
        }
    }

    /// Whether the call was wrong, rather than the world.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Usage(_) | Self::NoDatabase(_) => true,
            Self::Cluster(error) => error.is_usage(),
            Self::Store(_)
            | Self::Backup(_)
            | Self::Tls(_)
            | Self::Listen { .. }
            | Self::NoRandomness => false,
        }
    }
}

/// What `serve` tells once it takes connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listening {
    /// Where agents are served.
    pub agents: SocketAddr,
    /// Where health checks are answered.
    pub admin: SocketAddr,
    /// For `connect init --hub`.
    pub init_url: String,
}

/// What an operator wants of a hub that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Drain, then end; a second time: end at once.
    Stop,
    /// Read the certificate again.
    Reload,
}

/// Runs the hub until the first [`Order::Stop`], then drains it and stops the private database.
///
/// `listening` is called once, when connections are taken; what it returns is asked for one order after the
/// other.
///
/// # Errors
/// [`HubError`], before anything is served.
pub async fn serve<Orders: AsyncFnMut() -> Order>(
    config: ServeConfig,
    listening: impl FnOnce(&Listening) -> Orders,
) -> Result<(), HubError> {
    raise_file_limit();
    let lock = if config.uses_data_dir() { Some(DataDir::lock(config.data_dir())?) } else { None };
    let tls = match &config.tls {
        TlsSource::None => None,
        TlsSource::Files { cert_path, key_path } => Some(Tls::load(cert_path, key_path)?),
        TlsSource::SelfSigned(names) => Some(Tls::load_or_make(config.data_dir(), names.clone())?),
    };
    // Bound before the database starts: an address in use is told at once, and early agents wait.
    let listeners = Listeners {
        agents: listen(config.listen).await?,
        admin: listen(config.admin_listen).await?,
    };

    match &config.database {
        Database::Private => {
            let lock = lock.map_or_else(|| DataDir::lock(config.data_dir()), Ok)?;
            let cluster = Cluster::start(lock).await?;
            let served = async {
                migrate_as(&cluster.connect_options(OWNER_ROLE)).await?;
                let store = Store::connect(cluster.connect_options(APP_ROLE)).await?;
                run(&config, store, tls, listeners, listening).await
            }
            .await;
            cluster.stop().await;
            served
        }
        Database::Url(url) => {
            let store = Store::connect(url.connect_options()).await?;
            run(&config, store, tls, listeners, listening).await
        }
    }
}

/// Bound sockets.
struct Listeners {
    agents: TcpListener,
    admin: TcpListener,
}

async fn listen(address: SocketAddr) -> Result<TcpListener, HubError> {
    TcpListener::bind(address).await.map_err(|source| HubError::Listen { address, source })
}

/// Serves with everything in place.
async fn run<Orders: AsyncFnMut() -> Order>(
    config: &ServeConfig,
    store: Store,
    tls: Option<Tls>,
    listeners: Listeners,
    listening: impl FnOnce(&Listening) -> Orders,
) -> Result<(), HubError> {
    let bound = |listener: &TcpListener, address| {
        listener.local_addr().map_err(|source| HubError::Listen { address, source })
    };
    let agents = bound(&listeners.agents, config.listen)?;
    let admin = bound(&listeners.admin, config.admin_listen)?;
    let pin = tls.as_ref().and_then(|tls| tls.pin);
    let tls = tls.map(Arc::new);
    let hub = Arc::new(Hub::new(store.clone(), config.authorities(agents), config.registration));

    let recording = Arc::clone(&hub);
    let writer =
        tokio::spawn(async move { audit::write(recording.audit(), recording.store()).await });
    let service = Service {
        tls: tls.clone(),
        routes: routes::agents(Arc::clone(&hub)),
        proxies: Arc::new(config.trusted_proxies.clone()),
        must_authenticate: true,
        until: Phase::Stopping,
    };
    let doorman = Arc::clone(hub.doorman());
    let server = Server { listener: listeners.agents, doorman, service };
    let mut serving_agents = JoinSet::new();
    serving_agents.spawn(server.run(Arc::clone(&hub)));
    let service = Service {
        tls: None,
        routes: routes::admin(Arc::clone(&hub)),
        proxies: Arc::default(),
        must_authenticate: false,
        until: Phase::Ended,
    };
    let server = Server { listener: listeners.admin, doorman: Arc::default(), service };
    let mut serving_admin = JoinSet::new();
    serving_admin.spawn(server.run(Arc::clone(&hub)));

    let mut orders =
        listening(&Listening { agents, admin, init_url: config.init_url(agents, pin.as_ref()) });
    tokio::select! {
        () = supervise(&hub, tls.as_deref(), config.drain, &mut serving_agents, &mut orders) => {}
        () = hub.run_clock() => {}
        () = effects::run(&hub) => {}
        () = store.watch() => {}
        () = audit::expire(&store, config.audit_retention) => {}
    }
    // The ends of the tunnels are recorded too.
    hub.audit().finish();
    if let Err(error) = writer.await {
        tracing::error!(%error, "the writer of the audit logs");
    }
    hub.enter(Phase::Ended);
    while serving_admin.join_next().await.is_some() {}
    store.close().await;
    Ok(())
}

/// Obeys until no agent is connected any more.
async fn supervise(
    hub: &Hub,
    tls: Option<&Tls>,
    drain: Duration,
    serving: &mut JoinSet<()>,
    orders: &mut impl AsyncFnMut() -> Order,
) {
    until_stop(tls, orders).await;
    tracing::info!(?drain, "draining");
    hub.enter(Phase::Draining);
    let stop_at = Instant::now() + drain;
    let at_once = tokio::select! {
        () = sleep_until(stop_at) => false,
        () = until_stop(tls, orders) => true,
    };
    tracing::info!("stopping");
    hub.enter(Phase::Stopping);
    if at_once {
        return serving.shutdown().await;
    }
    tokio::select! {
        _ = serving.join_next() => {}
        () = until_stop(tls, orders) => serving.shutdown().await,
    }
}

/// Returns when the hub is told to stop; reloads until then.
async fn until_stop(tls: Option<&Tls>, orders: &mut impl AsyncFnMut() -> Order) {
    while orders().await == Order::Reload {
        match tls.map_or(Ok(false), Tls::reload) {
            Ok(true) => tracing::info!("the certificate was read again"),
            Ok(false) => tracing::info!("there is no certificate of yours to read again"),
            Err(error) => {
                let error = anyhow::Error::new(error);
                tracing::error!("the certificate stays as it was: {error:#}");
            }
        }
    }
}

/// The hub's database outside of `serve`.
enum Reached {
    /// The server of a URL, as the role of the URL.
    Url(PgConnectOptions),
    /// The private cluster, started for this.
    Started(Cluster),
    /// The private cluster of a hub that runs, which keeps it up to date.
    Running(PathBuf),
}

impl Reached {
    /// How to connect, as `role` where the URL does not name one.
    fn options(&self, role: &str) -> Result<PgConnectOptions, HubError> {
        Ok(match self {
            Self::Url(options) => options.clone(),
            Self::Started(cluster) => cluster.connect_options(role),
            Self::Running(data_dir) => cluster::connect_options(data_dir, role)?,
        })
    }

    async fn migrate(&self) -> Result<(), HubError> {
        match self {
            Self::Url(_) | Self::Started(_) => migrate_as(&self.options(OWNER_ROLE)?).await,
            Self::Running(_) => Ok(()),
        }
    }
}

/// Does `work` with the hub's database, of which the private one is started if no hub runs there.
async fn with_database<T>(
    args: &DatabaseArgs,
    work: impl AsyncFnOnce(&Reached) -> Result<T, HubError>,
) -> Result<T, HubError> {
    if let Database::Url(url) = args.database() {
        return work(&Reached::Url(url.connect_options())).await;
    }
    let data_dir = args.data_dir()?;
    let reached = match DataDir::lock(&data_dir) {
        Ok(lock) => Reached::Started(Cluster::start(lock).await?),
        Err(ClusterError::Locked { .. }) => Reached::Running(data_dir),
        Err(error) => return Err(error.into()),
    };
    let done = work(&reached).await;
    if let Reached::Started(cluster) = reached {
        cluster.stop().await;
    }
    done
}

/// A private database that was never made has nothing to look at.
fn must_exist(args: &DatabaseArgs) -> Result<(), HubError> {
    if args.database_url.is_none() {
        let data_dir = args.data_dir()?;
        if !cluster::exists(&data_dir) {
            return Err(HubError::NoDatabase(data_dir));
        }
    }
    Ok(())
}

/// Creates or updates the schema.
///
/// # Errors
/// [`HubError`].
pub async fn migrate(args: &DatabaseArgs) -> Result<(), HubError> {
    with_database(args, async |database| database.migrate().await).await
}

/// Makes a registration token and stores its hash.
///
/// # Errors
/// [`HubError`].
pub async fn create_registration_token(
    args: &DatabaseArgs,
    valid_for: Duration,
) -> Result<RegistrationToken, HubError> {
    let token = RegistrationToken(hex::encode(hub::random().ok_or(HubError::NoRandomness)?));
    with_database(args, async |database| {
        if let Reached::Started(_) = database {
            database.migrate().await?;
        }
        let mut connection = store::open(&database.options(APP_ROLE)?).await?;
        Ok(store::create_token(&mut connection, &token, valid_for).await?)
    })
    .await?;
    Ok(token)
}

/// Writes every row of the database to a file; gives how many rows each table has.
///
/// # Errors
/// [`HubError`].
pub async fn backup(args: &DatabaseArgs, file: &Path) -> Result<Rows, HubError> {
    must_exist(args)?;
    with_database(args, async |database| {
        Ok(backup::backup(&database.options(OWNER_ROLE)?, file).await?)
    })
    .await
}

/// Fills the database from a backup; gives how many rows each table got.
///
/// # Errors
/// [`HubError`]; nothing is changed then.
pub async fn restore(args: &DatabaseArgs, file: &Path, replace: bool) -> Result<Rows, HubError> {
    with_database(args, async |database| {
        if let Reached::Running(_) = database {
            // Says which process holds the directory.
            DataDir::lock(&args.data_dir()?)?;
        }
        let owner = database.options(OWNER_ROLE)?;
        let rows = backup::restore(&owner, file, replace).await?;
        let report = catalog::inspect(&mut store::open(&owner).await?).await?;
        if !report.findings.is_empty() {
            tracing::warn!(
                findings = report.findings.len(),
                "the rows are back, and something around them is not as it should be: see `connect-hub doctor`"
            );
        }
        Ok(rows)
    })
    .await
}

/// Says whether the database keeps workspaces apart.
///
/// # Errors
/// [`HubError`] when it cannot be asked.
pub async fn inspect(args: &DatabaseArgs) -> Result<Report, HubError> {
    must_exist(args)?;
    with_database(args, async |database| {
        let mut connection = store::open(&database.options(OWNER_ROLE)?).await?;
        Ok(catalog::inspect(&mut connection).await?)
    })
    .await
}

async fn migrate_as(owner: &PgConnectOptions) -> Result<(), HubError> {
    let mut connection = store::open(owner).await?;
    store::migrate(&mut connection).await?;
    connection.close().await.map_err(StoreError::from)?;
    Ok(())
}

/// Every connection is a file: take as many as the system lets us have.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays low");
    }
}
