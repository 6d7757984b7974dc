//! The schema by its version: the migrations, and how far a database is.

use sqlx::{migrate::Migrator, postgres::PgConnection};

use super::StoreError;

/// The migrations, in a schema of their own so that a shared database stays tidy.
fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!();
    migrator.create_schema("connect");
    migrator.dangerous_set_table_name("connect.schema_history");
    migrator
}

/// The schema version that this program serves.
#[must_use]
pub fn latest_version() -> i64 {
    migrator().iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// The schema version of the database; 0 when there is none.
///
/// # Errors
/// [`StoreError::Database`].
pub async fn version(connection: &mut PgConnection) -> Result<i64, StoreError> {
    let (there,): (bool,) =
        sqlx::query_as("SELECT to_regclass('connect.schema_history') IS NOT NULL")
            .fetch_one(&mut *connection)
            .await?;
    if !there {
        return Ok(0);
    }
    let (version,) = sqlx::query_as(
        "SELECT coalesce(max(version), 0) FROM connect.schema_history WHERE success",
    )
    .fetch_one(connection)
    .await?;
    Ok(version)
}

/// Brings the schema up to date and creates the roles. `owner` may create schemas and roles.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Migrate`].
pub async fn migrate(owner: &mut PgConnection) -> Result<(), StoreError> {
    migrator().run(owner).await?;
    Ok(())
}

/// Brings an empty or older schema to `version` and no further, for data that was written under it.
///
/// # Errors
/// As [`migrate`].
pub async fn migrate_to(owner: &mut PgConnection, version: i64) -> Result<(), StoreError> {
    migrator().run_to(version, owner).await?;
    Ok(())
}
