//! Hooks around a container's life.

use std::fs;
use std::path::Path;

use oci_spec::runtime::Hook;

use super::*;
use crate::hooks::Hooks;
use crate::{plan, request};

fn script(text: String) -> Vec<Hook> {
    let mut hook = Hook::default();
    hook.set_path("/bin/sh".into());
    hook.set_args(Some(vec!["sh".to_owned(), "-c".to_owned(), text]));
    vec![hook]
}

/// Hooks of which each does what the script of its name says, in `bundle`.
fn hooks(bundle: &Path, create: &str, start: &str) -> Hooks {
    let list = plan::Hooks {
        create_runtime: script(create.to_owned()),
        poststart: script(start.to_owned()),
        ..plan::Hooks::default()
    };
    let request = request::Create::new("default", "c1", bundle, Vec::new(), none()).unwrap();
    let spec = serde_json::from_str(r#"{"ociVersion":"1.2.0"}"#).unwrap();
    Hooks::new(list, &request, &spec)
}

#[tokio::test]
async fn they_run_before_the_container_is_made_and_after_its_start() {
    let bundle = tempfile::tempdir().unwrap();
    let f = Fixture::new();
    let hooks = hooks(bundle.path(), "cat > created", "cat > started");
    f.guest.hooks(hooks);
    f.created().await;
    let said = |name: &str| fs::read_to_string(bundle.path().join(name)).unwrap();
    assert!(said("created").contains(r#""status":"creating","pid":4711"#));
    assert!(!bundle.path().join("started").exists());
    f.sandbox.start("c1", "").await.unwrap();
    assert!(said("started").contains(r#""status":"running","pid":4711"#));
}

#[tokio::test]
async fn one_that_fails_before_the_container_is_made_fails_the_create() {
    let bundle = tempfile::tempdir().unwrap();
    let mut f = Fixture::new();
    f.guest
        .hooks(hooks(bundle.path(), "echo no >&2; exit 1", "true"));
    let request = f.request("c1", none());
    let error = f.sandbox.create(request).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Program);
    assert_eq!(
        error.chain(),
        "OCI runtime create failed: unable to start container process: error running \
         createRuntime hook #0: /bin/sh: exit status 1, stdout: , stderr: no"
    );
    assert_eq!(f.guest.balance(), (1, 1));
    assert!(f.told().is_empty());
}

#[tokio::test]
async fn one_that_fails_after_the_start_ends_the_container() {
    let bundle = tempfile::tempdir().unwrap();
    let mut f = Fixture::new();
    f.guest.hooks(hooks(bundle.path(), "true", "exit 1"));
    f.created().await;
    let error = f.sandbox.start("c1", "").await.unwrap_err();
    assert!(error.chain().contains("poststart hook #0"), "{error}");
    f.wait("").await;
    f.sandbox.delete("c1", "").await.unwrap();
    assert_eq!(f.guest.balance(), (1, 1));
    assert_eq!(f.told(), ["created 4711", "exited 255", "deleted 255"]);
}
