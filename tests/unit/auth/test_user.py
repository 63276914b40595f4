"""What a user decides and remembers."""

from libs.contracts.auth import PasswordChanged, UserSignedUp, UserUpdated
from libs.core.errors import Conflict, NotFound
from libs.testing.given import given
from services.auth.domain.user import USER, ChangeEmail, ChangePassword, SignUp

ADA = UserSignedUp(username="Ada", email="Ada@example.com")


def test_signing_up_makes_a_user() -> None:
    then = given(USER).when(SignUp(username="Ada", email="Ada@example.com"))
    then.then(ADA)
    assert (then.state.username, then.state.email, then.state.password_version) == ("Ada", "Ada@example.com", 1)


def test_a_user_signs_up_once() -> None:
    given(USER, ADA).when(SignUp(username="Ada", email="Ada@example.com")).then_refused(Conflict, code="user_exists")


def test_name_and_address_are_claimed_whatever_their_case() -> None:
    state = given(USER, ADA).state
    assert state is not None
    assert list(USER.unique_keys(state)) == ["username/ada", "email/ada@example.com"]


def test_another_email_address_frees_the_former() -> None:
    then = given(USER, ADA).when(ChangeEmail("countess@example.com"))
    then.then(UserUpdated(email="countess@example.com"))
    assert list(USER.unique_keys(then.state)) == ["username/ada", "email/countess@example.com"]


def test_the_same_email_address_changes_nothing() -> None:
    given(USER, ADA).when(ChangeEmail("Ada@example.com")).then()


def test_a_changed_password_outdates_what_was_opened_with_the_former() -> None:
    then = given(USER, ADA, PasswordChanged()).when(ChangePassword())
    then.then(PasswordChanged())
    assert then.state.password_version == 3


def test_nobody_changes_a_user_who_never_was() -> None:
    given(USER).when(ChangePassword()).then_refused(NotFound, code="user_not_found")
    given(USER).when(ChangeEmail("a@example.com")).then_refused(NotFound, code="user_not_found")
