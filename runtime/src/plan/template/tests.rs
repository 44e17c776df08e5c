use proptest::prelude::*;

use super::*;

fn earlier(count: usize) -> Vec<Mount> {
    (0..count)
        .map(|number| Mount {
            kind: "erofs".into(),
            source: format!("/layers/{number}.erofs"),
            options: Vec::new(),
            target: format!("/on/{number}"),
        })
        .collect()
}

fn host(path: &str) -> Place {
    Place::Host(path.into())
}

fn mounted(mount: usize, path: &str) -> Place {
    let path = path.to_owned();
    Place::Mounted { mount, path }
}

fn one(text: &str) -> Result<Place, Problem> {
    place(&expand(text, &earlier(3))?)
}

fn many(text: &str) -> Result<Vec<Place>, Problem> {
    places(&expand(text, &earlier(3))?)
}

#[test]
fn mounts_are_places() {
    assert_eq!(one("{{ mount 0 }}"), Ok(mounted(0, "")));
    assert_eq!(one("{{mount 2}}/upper"), Ok(mounted(2, "upper")));
    assert_eq!(one("{{ mount 1 }}//a/./b/"), Ok(mounted(1, "a/b")));
    assert_eq!(one("/plain/path"), Ok(host("/plain/path")));
    assert_eq!(one("{{ source 1 }}"), Ok(host("/layers/1.erofs")));
    assert_eq!(one("{{ target 1 }}/x"), Ok(host("/on/1/x")));
    assert_eq!(one("{{- mount 0 -}}  /x"), Ok(mounted(0, "x")));
}

#[test]
fn overlays_are_layers_in_order() {
    let layers = |order: [usize; 3]| Ok(order.map(|mount| mounted(mount, "")).to_vec());
    assert_eq!(many("{{ overlay 0 2 }}"), layers([0, 1, 2]));
    assert_eq!(many("{{ overlay 2 0 }}"), layers([2, 1, 0]));
    assert_eq!(many("{{ overlay 1 1 }}"), Ok(vec![mounted(1, "")]));
    assert_eq!(
        many("/top:{{ overlay 0 1 }}:{{ mount 2 }}/part:/a\\:b"),
        Ok(vec![
            host("/top"),
            mounted(0, ""),
            mounted(1, ""),
            mounted(2, "part"),
            host("/a:b"),
        ])
    );
}

#[test]
fn what_makes_no_sense_is_refused() {
    for (text, problem) in [
        ("{{ mount 3 }}", Problem::Index),
        ("{{ overlay 0 3 }}", Problem::Index),
        ("{{ mount 99999999999999999999 }}", Problem::Syntax),
        ("{{ mount -1 }}", Problem::Syntax),
        ("{{ mount +1 }}", Problem::Syntax),
        ("{{ mount }}", Problem::Syntax),
        ("{{ mount 0 1 }}", Problem::Syntax),
        ("{{ overlay 0 }}", Problem::Syntax),
        ("{{ printf 0 }}", Problem::Syntax),
        ("{{ }}", Problem::Syntax),
        ("{{ mount 0", Problem::Syntax),
        ("{{ mount 0 }}upper", Problem::Path),
        ("/x{{ mount 0 }}", Problem::Path),
        ("{{ mount 0 }}/../x", Problem::Path),
        ("{{ mount 0 }}{{ mount 1 }}", Problem::Path),
        ("{{ overlay 0 1 }}", Problem::Path),
        ("relative", Problem::Path),
        ("", Problem::Path),
    ] {
        assert_eq!(one(text), Err(problem), "{text:?}");
    }
    for text in [
        "",
        ":",
        "/a:",
        ":/a",
        "/a::/b",
        "relative:/a",
        "{{ overlay 0 1 }}x",
    ] {
        assert_eq!(many(text), Err(Problem::Path), "{text:?}");
    }
}

#[test]
fn nothing_precedes_the_first_mount() {
    assert_eq!(expand("{{ mount 0 }}", &[]), Err(Problem::Index));
    assert_eq!(
        place(&literal("/{{ mount 0 }}")),
        Ok(host("/{{ mount 0 }}"))
    );
}

/// A layer of an overlay, and the text for it.
fn layer() -> impl Strategy<Value = (Place, String)> {
    prop_oneof![
        "/[a-z:\\\\ ]{1,8}".prop_map(|path| {
            let text = path.replace('\\', "\\\\").replace(':', "\\:");
            (Place::Host(path.into()), text)
        }),
        (0..3_usize, "(/[a-z]{1,3}){0,2}").prop_map(|(mount, path)| {
            let text = format!("{{{{ mount {mount} }}}}{path}");
            let path = path.trim_start_matches('/').to_owned();
            (Place::Mounted { mount, path }, text)
        }),
    ]
}

proptest! {
    #[test]
    fn layers_come_back(layers in proptest::collection::vec(layer(), 1..10)) {
        let (places, texts): (Vec<Place>, Vec<String>) = layers.into_iter().unzip();
        prop_assert_eq!(many(&texts.join(":")), Ok(places));
    }

    #[test]
    fn ranges_have_all_their_mounts_once(first in 0..30_usize, last in 0..30_usize) {
        let text = format!("{{{{ overlay {first} {last} }}}}");
        let found = places(&expand(&text, &earlier(30)).unwrap()).unwrap();
        prop_assert_eq!(found.len(), first.abs_diff(last) + 1);
        prop_assert_eq!(found.first(), Some(&mounted(first, "")));
        prop_assert_eq!(found.last(), Some(&mounted(last, "")));
    }

    /// Nothing that is made of a template leads out of what it names.
    #[test]
    fn any_text_is_a_place_or_refused(text in "[-{} a-z0-2/.:\\\\]{0,40}|(\\{\\{ mount [0-3] \\}\\}|/|\\.\\.|:|x){0,8}") {
        for place in many(&text).into_iter().flatten().chain(one(&text)) {
            match place {
                Place::Host(path) => prop_assert!(path.is_absolute()),
                Place::Mounted { mount, path } => {
                    prop_assert!(mount < 3);
                    prop_assert!(path.is_empty() || path.split('/').all(|part| !matches!(part, "" | "." | "..")));
                }
            }
        }
    }
}
