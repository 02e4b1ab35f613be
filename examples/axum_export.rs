//! A web service that runs each export for one client at a time, on any number of hosts:
//! `DATABASE_URL=.. cargo run --example axum_export`, then twice `curl -X POST "localhost:3000/export/sales?seconds=9"`

use std::{collections::HashMap, env, error::Error, process::ExitCode, time::Duration};

use axum::extract::{Path, Query, State};
use axum::{Router, http::StatusCode, routing::post};
use bb8::{ManageConnection, Pool};
use diesel_async::pooled_connection::{AsyncDieselConnectionManager as Manager, PoolError};
use dlock_diesel_async::{AdvisoryLock, LockConnection, LockKey};

mod support;

#[tokio::main]
async fn main() -> ExitCode {
    support::exit_code(support::on_server_async!(serve), 1)
}

async fn serve<C: LockConnection + 'static>(url: &str) -> support::Result<ExitCode>
where
    Manager<C>: ManageConnection<Connection = C, Error = PoolError>,
{
    support::connect_async::<C>(url).await?; // fails at once, where a pool would retry
    let pool = Pool::builder().build_unchecked(Manager::<C>::new(url));
    let app = Router::new()
        .route("/export/{name}", post(export::<C>))
        .with_state(pool);
    let address = env::args().nth(1).unwrap_or("127.0.0.1:3000".into());
    let listener = tokio::net::TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    axum::serve(listener, app).await?;
    Ok(ExitCode::SUCCESS)
}

type Answer = (StatusCode, String);

/// If the client goes away, axum drops this future. That frees the lock for the next client.
async fn export<C: LockConnection + 'static>(
    State(pool): State<Pool<Manager<C>>>,
    Path(name): Path<String>,
    Query(options): Query<HashMap<String, u64>>,
) -> Result<Answer, Answer>
where
    Manager<C>: ManageConnection<Connection = C, Error = PoolError>,
{
    let conn = pool.get_owned().await.map_err(failed)?;
    let lock = AdvisoryLock::new(conn, LockKey::namespaced("export", &name));
    let Some(lock) = lock.try_acquire().await.map_err(failed)? else {
        return Ok((StatusCode::CONFLICT, format!("{name} is being exported\n")));
    };
    // Real work would use `lock` as its connection. This only waits.
    let seconds = options.get("seconds").copied().unwrap_or_default();
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    lock.release().await.map_err(failed)?;
    Ok((StatusCode::OK, format!("{name} is exported\n")))
}

fn failed(error: impl Error) -> Answer {
    (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))
}
