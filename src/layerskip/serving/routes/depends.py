"""What routes are given."""

from typing import Annotated, cast

from fastapi import Depends, Request

from layerskip.serving.service import Service


def service_of(http: Request) -> Service:
    """The service of the app that a request came to."""
    return cast("Service", http.app.state.service)


ServiceOf = Annotated[Service, Depends(service_of)]
